"""States in the place of a long prompt, in every layer of a decoder."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import checks
from ...conversion.report import ConversionReport
from ...convert import prefix_to_state
from ...state import PrefixState
from .attach import attach_children, check_bare, detach_prefix
from .modules import attention_modules
from .observer import Observer


def prompt_to_states(
    model: PreTrainedModel,
    prompt: Tensor,
    calibration: Tensor,
    *,
    position: int = 0,
    modules: str | None = None,
    progress: bool = True,
    return_report: bool = False,
    **options,
) -> dict[str, PrefixState] | tuple[dict[str, PrefixState], dict[str, ConversionReport]]:
    """Converts what a decoder makes of a prompt to a state for each of its attention modules.

    `attach_prefix(model, prefixes=states)` then does with a few rows per head what the prompt does with its whole
    length. The model reads the prompt once, and each calibration text as what follows it; `prefix_to_state` fits each
    module's state to the queries of these texts.

    Args:
        model: a decoder without prefixes. Each of its layers has attention, and each token sees the whole prompt in it:
            no sliding window that is shorter than prompt and text; no softcap.
        prompt: [m] or [1, m] token ids.
        calibration: [N, L] token ids: N texts like those that will follow the prompt, of L tokens, at least 2. The last
            quarter of them (of the tokens, if N is 1) is held out. The model may have written them itself:
            `model.generate(prompt, do_sample=True, num_return_sequences=N)`, less the prompt. N·L·Hq·(D + Dv + 1)
            numbers are kept of each module until it is fitted.
        position: of the first token after the prompt. 0, the default: the prompt has the positions -m to -1, so that
            later inputs need no `position_ids`. Rotary embeddings know such positions. m: positions as usual, and
            later inputs need `position_ids` from m on; for models with a table of positions (GPT-2, OPT), and rotary
            embeddings whose frequencies depend on the length (dynamic, longrope).
        modules: a regular expression that is searched for in the names of the attention modules, as in `attach_prefix`;
            None for all. What is left out has nothing of the prompt afterwards.
        progress: show bars (tqdm).
        return_report: also a `ConversionReport` for each module.
        options: of `prefix_to_state`: `num_rows` (128 if nothing else is said) or `error`, `keep`, `feature_map`, ...

    Returns:
        States, and reports, by the names of the modules; of those only that tokens reach (not of an encoder of images).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, or the module. The model is what it was
            before, in any case.
    """
    found = attention_modules(model, modules)
    check_bare(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"`model` must be a decoder, got {type(model).__name__}, which has an encoder too")
    for name in ("query", "attention", "scale"):
        if name in options:
            raise TypeError(f"`{name}` must not be given, got one: it is taken from the model")
    inspect.signature(prefix_to_state).bind_partial(**options)  # before minutes of reading
    checks.check_bool("progress", progress)
    checks.check_bool("return_report", return_report)
    prompt = _tokens("prompt", prompt, model)
    calibration = _tokens("calibration", calibration, model)
    _check_positions(model, position, len(prompt), calibration.shape[1])
    observers = {name: Observer(name, len(prompt)) for name in found}
    with _observed(model, found, observers), torch.no_grad():
        _read(model, prompt, calibration, position, observers, progress)
    observers = {name: observer for name, observer in observers.items() if observer.texts}
    _check_observed(model, modules, observers, len(calibration))
    states, reports = {}, {}
    for name in _bar(list(observers), "fitting", progress):
        observed = observers.pop(name).observed()
        states[name], reports[name] = prefix_to_state(**observed._asdict(), return_report=True, **options)
    return (states, reports) if return_report else states


def _tokens(name: str, tokens, model: PreTrainedModel) -> Tensor:
    """[m] or [N, L], on the device of the model."""
    checks.check_tensor(name, tokens)
    if tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` must be token ids, int64 or int32, got {tokens.dtype}")
    if name == "prompt":
        if tokens.dim() == 2 and tokens.shape[0] == 1:
            tokens = tokens[0]
        if tokens.dim() != 1 or len(tokens) == 0:
            raise ValueError(f"`prompt` must have shape [m] or [1, m], m at least 1, got {list(tokens.shape)}")
    elif tokens.dim() != 2 or len(tokens) == 0 or tokens.shape[1] < 2:
        raise ValueError(f"`{name}` must have shape [N, L], L at least 2, got {list(tokens.shape)}")
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is None:
        raise ValueError(f"`model` must take token ids, got {type(model).__name__}")
    if not ((tokens >= 0) & (tokens < known)).all():
        raise ValueError(
            f"`{name}` must be token ids from 0 to {known - 1}, got {tokens.min().item()} to {tokens.max().item()}"
        )
    return tokens.to(model.device)


def _check_positions(model: PreTrainedModel, position: int, prompt_length: int, length: int) -> None:
    checks.check_int("position", position, minimum=0)
    if any("rotary" in type(module).__name__.lower() for module in model.modules()):
        return
    kind = f"{type(model).__name__}, which has no rotary embeddings"
    if position < prompt_length:
        raise ValueError(f"`position` must be at least m={prompt_length} in {kind}, got {position}")
    known = getattr(model.config, "max_position_embeddings", None)
    if known is not None and position + length > known:
        raise ValueError(
            f"`position` must leave room for the {length} tokens of a calibration text in the {known} positions of "
            f"{kind}, got {position}"
        )


@contextmanager
def _observed(model: PreTrainedModel, found: dict, observers: dict[str, Observer]) -> Iterator[None]:
    """Has the modules observed; the model is as if in use, not in training."""
    trained = [module for module in model.modules() if module.training]
    attach_children(model, found, observers, freeze=False)
    model.eval()
    try:
        yield
    finally:
        detach_prefix(model)
        for module in trained:
            module.training = True


def _read(model, prompt, calibration, position, observers, progress) -> None:
    decoder = model.base_model  # without the head: nobody asked for logits
    takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters

    def read(tokens: Tensor, first: int, cache):
        positions = torch.arange(first, first + len(tokens), device=tokens.device)[None]
        options = {"position_ids": positions} if takes_positions else {}
        return decoder(input_ids=tokens[None], past_key_values=cache, use_cache=True, **options)

    cache = getattr(read(prompt, position - len(prompt), None), "past_key_values", None)
    if cache is None:
        raise ValueError(f"`model` must be a decoder with a cache, got {type(model).__name__}, which has none")
    for observer in observers.values():
        observer.reads_prompt = False
    for text in _bar(calibration, "reading", progress):
        read(text, position, copy.deepcopy(cache))  # a copy, since not every cache can be cut back


def _check_observed(model, modules: str | None, observers: dict[str, Observer], num_texts: int) -> None:
    if not observers:
        raise ValueError(f"`modules` must match an attention module that tokens reach, got {modules!r}")
    for name, observer in observers.items():
        if len(observer.texts) != num_texts:
            raise ValueError(f"`modules` must leave out `{name}`, which attends more than once, got {modules!r}")
    layers = model.config.get_text_config().num_hidden_layers
    if modules is None and len(observers) < layers:
        raise ValueError(
            f"`modules` must be given for {type(model).__name__}, got None: {layers - len(observers)} of its {layers} "
            "layers have no attention that could take a state, and will have nothing of the prompt"
        )


def _bar(items, what: str, progress: bool):
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, disable=not progress)
