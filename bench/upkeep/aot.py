"""Compiles kernel launches for GPUs that are not there, and reads the machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from . import hazards

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
_TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTC[A-Z]*MMA)|v_mfma")
_VIEW = re.compile(r"(ttg\.convert_layout|tt\.(reshape|trans|split|join|bitcast|expand_dims))\b")
_INSTRUCTION = {
    "cuda": re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\S", re.M),
    "hip": re.compile(r"^\t(?:[sv]_|ds_|buffer_|global_|flat_|scratch_)\w+", re.M),
}
_EXP2 = re.compile(r"\bMUFU\.EX2|v_exp_f32")
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Compiled:
    """A kernel for one target: resources and what its machine code holds."""

    arch: str
    kernel: triton.compiler.CompiledKernel

    @property
    def shared(self) -> int:
        """Bytes of shared memory a program."""
        return self.kernel.metadata.shared

    @property
    def registers(self) -> int:
        """A thread."""
        pattern, text = (r"\.vgpr_count:\s+(\d+)", self.machine_code) if self._is_amd else (r"REG:(\d+)", self._usage)
        return int(re.search(pattern, text).group(1))

    @property
    def spilled(self) -> int:
        """Bytes of registers a thread that went to memory."""
        if self._is_amd:
            return 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", self.machine_code).group(1))
        spills = re.findall(r"\b(?:LDL|STL)\b", self.machine_code)
        return int(re.search(r"STACK:(\d+)", self._usage).group(1)) if spills else 0

    @property
    def instructions(self) -> int:
        return len(_INSTRUCTION[TARGETS[self.arch].backend].findall(self.machine_code))

    @property
    def tensor_core(self) -> str:
        """Tensor-core instructions, by name, with their number."""
        names = [match.group(1) or "MFMA" for match in _TENSOR_CORE.finditer(self.machine_code)]
        return " ".join(f"{name}×{names.count(name)}" for name in sorted(set(names)))

    @property
    def exp2_in_main_loop(self) -> int:
        """exp2 instructions in the shortest loop that has exp2 and tensor-core instructions."""
        loops = [body for body in self._loops() if _TENSOR_CORE.search(body) and _EXP2.search(body)]
        return len(_EXP2.findall(min(loops, key=len))) if loops else 0

    @property
    def hazards(self) -> list[str]:
        """What may make its results wrong, or keeps products from running at once."""
        found = pipelined_register_dots(self.kernel.asm["ttgir"])
        if self.arch == "sm90":
            found += hazards.overwritten_operands(self.machine_code) + hazards.serialised_loops(self.machine_code)
        return found

    @property
    def waits_in_main_loop(self) -> int:
        """Waits for products of the tensor cores in the shortest loop that has some; sm90 only, else 0."""
        return hazards.waits_in_loops(self.machine_code) if self.arch == "sm90" else 0

    @property
    def _is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @cached_property
    def machine_code(self) -> str:
        return self.kernel.asm["amdgcn"] if self._is_amd else self._run("nvdisasm", "--print-code", "--no-dataflow")

    @cached_property
    def _usage(self) -> str:
        return self._run("cuobjdump", "--dump-resource-usage")

    def _run(self, tool: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [_BIN / tool, *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _loops(self) -> list[str]:
        """Text between each label and a branch back to it."""
        lines = self.machine_code.splitlines()
        labels, loops = {}, []
        for number, line in enumerate(lines):
            if match := re.match(r"(\.L\w+):", line.strip()):
                labels[match.group(1)] = number
            elif match := re.search(r"(?:BRA[.\w]*|branch\w*)\s.*?(\.L\w+)", line):
                start = labels.get(match.group(1))
                if start is not None:
                    loops.append("\n".join(lines[start:number]))
        return loops


def pipelined_register_dots(ttgir: str) -> list[str]:
    """Hopper products whose left side is in registers that the loop writes again while they may still be read.

    Triton 3.6.0 does not protect these (issue 9433, corrected by 9514). A product is complete at a wait with p pending
    if at least p others were issued after it. Loops are looked at one by one, in the text that MLIR prints: the
    operations of a loop are two spaces further in than the loop.
    """
    lines = ttgir.splitlines()
    found = []
    for start, line in enumerate(lines):
        if re.search(r"(^\s*|= )scf\.(for|while)\b", line):
            depth = len(line) - len(line.lstrip())
            end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(" " * depth + "}"))
            body = {i: lines[i] for i in range(start + 1, end) if _depth(lines[i]) == depth + 2}
            carried = set(re.findall(r"(%\w+) = %", line.partition("iter_args(")[2]))
            found += _pipelined_in(body, carried)
    return found


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _pipelined_in(body: dict[int, str], carried: set[str]) -> list[str]:
    written, events = {}, []
    for i, text in body.items():
        if match := re.match(r"\s*(%[\w#:, %]+?) = ", text):
            written |= {name.strip().split(":")[0]: i for name in match[1].split(",")}
        if "ttng.warp_group_dot " in text:
            events.append((i, None))
        elif "ttng.warp_group_dot_wait" in text:
            events.append((i, int(re.search(r"pendings = (\d+)", text)[1])))
    found = []
    for i, text in body.items():
        match = re.search(r"ttng\.warp_group_dot (%\w+)", text)
        if not match or "isAsync = true" not in text or not re.search(r"[^>] : tensor<", text):
            continue
        line = _where_written(match[1], body, written, carried)
        if line is None and match[1] not in carried:
            continue  # from before the loop: never written again
        later = [pending for at, pending in events if at > i]
        if line is not None:  # in the next iteration
            later += [pending for at, pending in events if at < line]
        issued = 0
        for pending in later:
            if pending is None:
                issued += 1
            elif issued >= pending:
                break
        else:
            found.append(f"left side of a product in flight is written again (triton issue 9433): {text.strip()[:80]}")
    return found


def _where_written(name: str, body: dict[int, str], written: dict[str, int], carried: set[str]) -> int | None:
    """Line of the operation that computes `name`, through views, which may share its registers."""
    line = written.get(name)
    while line is not None and _VIEW.search(body[line]):
        name = re.search(r"(%\w+)", body[line].partition(" = ")[2])[1]
        if name not in carried and name not in written:
            return line
        line = None if name in carried else written[name]
    return line


def compile_launch(launch, arch: str) -> Compiled:
    """The kernel of a launch as the target's GPU would run it; tensors may be on the meta device."""
    source = ASTSource(launch.kernel, *specialisation(launch))
    return Compiled(arch, triton.compile(source, target=TARGETS[arch], options=launch.options))


def specialisation(launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes: launches that agree in them share a compiled kernel."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, argument) in enumerate(zip(launch.kernel.params, launch.args, strict=True)):
        specialize = not parameter.do_not_specialize
        signature[parameter.name] = _describe(argument, (i,), specialize, constants, attributes)
    return signature, constants, attributes


def _describe(argument, path: tuple, specialize: bool, constants: dict, attributes: dict):
    """The type of an argument, as Triton's launcher finds it; what is inside of tuples is always specialised."""
    if argument is None:
        constants[path] = None
        return "constexpr"
    if isinstance(argument, tl.constexpr):
        constants[path] = argument.value
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return "*" + _TYPES[argument.dtype]
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{_TYPES[argument.base.dtype]}{list(argument.block_shape)}>"
    if isinstance(argument, float):
        return "fp32"
    if isinstance(argument, int):
        if specialize and argument == 1:
            constants[path] = 1
            return "constexpr"
        if specialize and argument % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= argument < 2**31 else "i64"
    items = [_describe(item, (*path, i), True, constants, attributes) for i, item in enumerate(argument)]
    return type(argument)(*items) if hasattr(argument, "_fields") else tuple(items)
