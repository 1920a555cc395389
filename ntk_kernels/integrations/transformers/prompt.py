"""`prompt_to_states`: converts a long prompt to a state for each attention module of a decoder."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ... import checks
from ...conversion.api import prefix_to_state
from ...conversion.options import FitOptions
from ...conversion.report import ConversionReport
from ...state import PrefixState
from .attach import attach_children, check_bare, detach_prefix
from .attention_modules import attention_modules, list_names, placement
from .observer import Observer


@overload
def prompt_to_states(
    model: PreTrainedModel, prompt: Tensor, texts: Tensor | Sequence[Tensor], *, text_position: int = 0,
    modules: str | None = None, progress: bool = True, return_report: Literal[False] = False, **options: Any,
) -> dict[str, PrefixState]: ...  # fmt: skip


@overload
def prompt_to_states(
    model: PreTrainedModel, prompt: Tensor, texts: Tensor | Sequence[Tensor], *, text_position: int = 0,
    modules: str | None = None, progress: bool = True, return_report: Literal[True], **options: Any,
) -> tuple[dict[str, PrefixState], dict[str, ConversionReport]]: ...  # fmt: skip


def prompt_to_states(
    model: PreTrainedModel,
    prompt: Tensor,
    texts: Tensor | Sequence[Tensor],
    *,
    text_position: int = 0,
    modules: str | None = None,
    progress: bool = True,
    return_report: bool = False,
    **options: Any,
) -> dict[str, PrefixState] | tuple[dict[str, PrefixState], dict[str, ConversionReport]]:
    """Converts the keys and values that a decoder computes for a prompt to a state for each attention module.

    After `attach_prefix(model, prefixes=states)` a few rows per head do what the prompt does with its whole length. The
    model reads the prompt and then each text as its continuation; `prefix_to_state` fits each module's state to the
    queries of these texts.

    Args:
        model: a decoder without prefixes, all of whose layers pass on a prompt by attention only and let each token see
            all of it: no sliding window shorter than prompt and text, no recurrence, no softcap.
        prompt: [m] or [1, m] token ids.
        texts: [N, L] token ids, or N tensors [L] or [1, L] of any lengths: texts like those that will follow the
            prompt, without padding. The last quarter of their tokens is held out. The model may have written them
            itself (`model.generate(prompt, do_sample=True, ...)`, less the prompt). Until a module is fitted,
            N·L·Hq·(D + Dv + 1) numbers are kept for it on its device.
        text_position: position of the first token after the prompt. 0, the default: the prompt has the positions -m to
            -1, so that later inputs need no `position_ids`. Rotary embeddings can do this, unless their frequencies
            depend on the length (dynamic, longrope). m: positions stay as they are with the prompt, and later inputs,
            also to `generate`, need `position_ids` from m on; the only way for tables of positions (GPT-2, OPT).
        modules: a regular expression that is searched for in the names of the attention modules, as in `attach_prefix`;
            None for all. Other modules get nothing of the prompt.
        progress: whether to show progress bars (tqdm).
        return_report: whether to return a `ConversionReport` for each module too.
        options: of `prefix_to_state`: `num_rows` (default 128), `error` or `budget`, `keep`, `feature_map`, ... With
            `error` or `budget`, size and recipe can differ from module to module.

    Returns:
        States, and reports, by the names of the modules; only modules that tokens reach (none of an encoder of images).

    Raises:
        TypeError, ValueError: an argument does not fit, and the message names it; or the model is not as above. If
            `modules` is None this is tested: with all rows of the prompt as states, the first text has to give what it
            gives after the prompt. The model is restored in any case.
    """
    found = attention_modules(model, modules)
    check_bare(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"`model` must be a decoder, got {type(model).__name__}, which has an encoder too")
    known = [field.name for field in fields(FitOptions)]
    for name in options:
        if name not in known:
            raise TypeError(f"`{name}` must not be given, only options of prefix_to_state, which are {known}")
    checks.check_bool("progress", progress)
    checks.check_bool("return_report", return_report)
    prompt, texts = _prompt_and_texts(model, prompt, texts)
    FitOptions(**options).resolve(len(prompt), has_query=True)  # refuses them before the model reads
    _check_positions(model, text_position, len(prompt), max(len(text) for text in texts))
    observers = {name: Observer(len(prompt)) for name in found}
    with _observed(model, found, observers), torch.no_grad():
        reader = _Reader(model, observers, prompt, text_position)
        for i, text in enumerate(_bar(texts, "reading", progress)):
            reader.read(text)
            if i == 0:
                reader.check(text, modules)
    observers = {name: observer for name, observer in observers.items() if observer.queries}
    states, reports = {}, {}
    for name in _bar(list(observers), "fitting", progress):
        observed = observers.pop(name).observed()
        try:
            states[name], reports[name] = prefix_to_state(**observed._asdict(), return_report=True, **options)
        except ValueError as error:
            raise ValueError(f"no state could be fitted for `{name}`: {error}") from error
    return (states, reports) if return_report else states


class _Reader:
    """A model that has read a prompt and reads texts as its continuation."""

    def __init__(self, model: PreTrainedModel, observers: dict[str, Observer], prompt: Tensor, text_position: int):
        self.model, self.observers, self.prompt, self.text_position = model, observers, prompt, text_position
        self.cache = self._forward(prompt, text_position - len(prompt), use_cache=True).get("past_key_values")
        if self.cache is None:
            raise ValueError(f"`model` must be a decoder with a cache, got {type(model).__name__}, which has none")

    def read(self, text: Tensor) -> None:
        """Reads a text while the observers record."""
        self._set_part("observe")
        # A copy, since not every cache can be cut back.
        self._forward(text, self.text_position, past_key_values=copy.deepcopy(self.cache), use_cache=True)
        self._set_part("none")

    def check(self, text: Tensor, modules: str | None) -> None:
        """Raises ValueError if states cannot replace the prompt; `text` is the only one that was read."""
        reached = {name: o for name, o in self.observers.items() if o.queries or o.trouble is not None}
        if not reached:
            raise ValueError(f"`modules` must match an attention module that tokens reach, got {modules!r}")
        repeated = "attention is computed more than once for a text"
        troubles = {name: o.trouble or repeated for name, o in reached.items() if o.trouble or len(o.queries) > 1}
        if troubles:
            why = " and ".join(sorted(set(troubles.values())))
            if len(troubles) == len(reached):
                name = type(self.model).__name__
                raise ValueError(f"`model` must have attention that states can take part in, got {name}, where {why}")
            fit = [module for module in reached if module not in troubles]
            raise ValueError(
                f"`modules` must match none of {list_names(troubles)}, where {why}, got {modules!r}; of "
                f"{list_names(fit)} it may match all. What is left out has nothing of the prompt afterwards"
            )
        if modules is None:
            self._check_as_states(text)

    def _check_as_states(self, text: Tensor) -> None:
        """Compares the hidden states of a text after the prompt and after all its rows as states.

        The median over the tokens decides, since rounding may send a few tokens to other experts.
        """
        expected = self._forward(torch.cat([self.prompt, text]))[0][0, len(self.prompt) :].float()
        self._set_part("replay")
        got = self._forward(text, self.text_position)[0][0].float()
        self._set_part("none")
        if not expected.isfinite().all():
            raise ValueError(
                f"`model` must give finite hidden states, got {type(self.model).__name__} in {self.model.dtype}, which "
                "after the prompt gives others for the first text"
            )
        off = ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
        if not off <= torch.finfo(self.model.dtype).eps ** 0.5:
            length = len(self.prompt)
            other = "" if self.text_position == length else f" (try {length}, the length of the prompt)"
            raise ValueError(
                "`model` must pass on a prompt by attention and nothing else, and `text_position` fit it: with all "
                f"rows of the prompt as states the last hidden states of a text are off by {off:.2g} of themselves in "
                f"{type(self.model).__name__} at text_position={self.text_position}{other}; `modules` may say which "
                "modules get states all the same"
            )

    def _forward(self, tokens: Tensor, first: int | None = None, **options: Any) -> ModelOutput:
        """Runs the model without its head, at the positions from `first` on, or those that it chooses itself."""
        if first is not None:
            options["position_ids"] = torch.arange(first, first + len(tokens), device=tokens.device)[None]
        return self.model.base_model(input_ids=tokens[None], return_dict=True, **{"use_cache": False} | options)

    def _set_part(self, part: Literal["none", "observe", "replay"]) -> None:
        for observer in self.observers.values():
            observer.part = part


def _prompt_and_texts(
    model: PreTrainedModel, prompt: Tensor, texts: Tensor | Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Checks prompt and texts; returns them as [m] and N times [L] on the device where the model takes tokens."""
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    if known is None:
        raise ValueError(f"`model` must take token ids, got {type(model).__name__}")
    device = placement(model.get_input_embeddings(), model)["device"]

    def flat(name: str, tokens: Tensor) -> Tensor:
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"`{name}` must be a torch.Tensor of token ids, got {type(tokens).__name__}; "
                "tokenizer(text, return_tensors='pt').input_ids[0] is one"
            )
        checks.check_tensor(name, tokens)
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"`{name}` must be token ids, int64 or int32, got {tokens.dtype}")
        ids = tokens[0] if tokens.dim() == 2 and len(tokens) == 1 else tokens
        if ids.dim() != 1 or len(ids) == 0:
            raise ValueError(f"`{name}` must have shape [n] or [1, n], n at least 1, got {list(tokens.shape)}")
        if not ((ids >= 0) & (ids < known)).all():
            raise ValueError(
                f"`{name}` must be token ids from 0 to {known - 1}, got {ids.min().item()} to {ids.max().item()}"
            )
        return ids.to(device)

    prompt = flat("prompt", prompt)
    if isinstance(texts, Tensor) and texts.dim() != 2:
        raise ValueError(f"`texts` must have shape [N, L], got {list(texts.shape)}")
    if not isinstance(texts, Tensor | Sequence) or isinstance(texts, str):
        raise TypeError(
            f"`texts` must be a tensor or a sequence of tensors of token ids, got {type(texts).__name__}; "
            "tokenizer(text, return_tensors='pt').input_ids[0] is one"
        )
    texts = [flat(f"texts[{i}]", text) for i, text in enumerate(texts)]
    if not texts:
        raise ValueError("`texts` must be at least one, got none")
    return prompt, texts


def _check_positions(model: PreTrainedModel, text_position: int, prompt_length: int, max_length: int) -> None:
    checks.check_int("text_position", text_position, minimum=0)
    decoder = model.base_model
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(f"`model` must take `position_ids`, got {type(model).__name__}, which does not")
    if any("rotary" in type(module).__name__.lower() for module in decoder.modules()):
        return
    kind = f"{type(model).__name__}, which has no rotary embeddings"
    if text_position < prompt_length:
        raise ValueError(f"`text_position` must be at least m={prompt_length} in {kind}, got {text_position}")
    known = getattr(model.config, "max_position_embeddings", None)
    if known is not None and text_position + max_length > known:
        raise ValueError(
            f"`text_position` must leave room for the {max_length} tokens of a text in the {known} positions of "
            f"{kind}, got {text_position}"
        )


@contextmanager
def _observed(model: PreTrainedModel, found: dict[str, nn.Module], observers: dict[str, Observer]) -> Iterator[None]:
    """Attaches the observers to their modules and puts the model into evaluation mode."""
    trained = [module for module in model.modules() if module.training]
    attach_children(model, found, observers, freeze=False)
    model.eval()
    try:
        yield
    finally:
        detach_prefix(model)
        for module in trained:
            module.training = True


def _bar(items: list[Any], description: str, progress: bool) -> Iterable[Any]:
    from tqdm.auto import tqdm

    return tqdm(items, desc=description, disable=not progress)
