"""CUDA C++ -> C++: the four constructs that the macros and functions of cuda_runtime.h cannot express.

======================================  ================================================================================
``kernel<<<config>>>(arguments);``      ``emulate::launch("kernel", ..., kernel, emulate::Config(config), arguments);``
``extern __shared__ ... T name[];``     ``T* const name = emulate::dynamic_shared<T>();``
``__shared__ T a[N], b;``               a static ``emulate::SharedVariable`` and a reference for each
``asm("op.x %0, [%1];" : ... : ...);``  ``emulate::ptx::op_x(operands);``, the operands in the order of the text
======================================  ================================================================================

Line numbers stay, and a ``#line`` at the top names the original. Text that looks like one of these constructs and
cannot be understood is an error, so that a kernel is never emulated in part.
"""

from __future__ import annotations

import re
from pathlib import Path


class TransformError(ValueError):
    """A construct that this file does not know; the message quotes it."""


def split(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside of brackets and string literals."""
    parts, depth, quoted = [""], 0, False
    for c in text:
        quoted ^= c == '"'
        if not quoted:
            depth += (c in "([{") - (c in ")]}")
        if c == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        quoted ^= text[i] == '"'
        if not quoted:
            depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise TransformError(f"unbalanced: {text[start : start + 80]}")


def padded(new: str, old: str) -> str:
    """`new` on one line, with as many line breaks behind it as `old` has."""
    return " ".join(new.split()) + "\n" * old.count("\n")


def kernel_start(text: str, end: int) -> int:
    """Where the kernel of a launch begins that ends at `end`: a name with template arguments, or parentheses."""
    begin, depth = end, 0
    if text[end - 1] == ")":
        while depth or begin == end:
            begin -= 1
            depth += (text[begin] == ")") - (text[begin] == "(")
        return begin
    while depth or re.match(r"[\w:>]", text[begin - 1]):
        begin -= 1
        depth += (text[begin] == ">") - (text[begin] == "<")
    return begin


def launches(text: str) -> str:
    """``kernel<<<...>>>(...);``"""
    while (at := text.find("<<<")) >= 0:
        begin, middle = kernel_start(text, at), text.find(">>>(", at)
        end = closing(text, middle + 3)
        if begin == at or middle < 0 or text[end + 1] != ";":
            raise TransformError(f"not a launch: {text[begin : at + 80]}")
        kernel, config, arguments = text[begin:at], text[at + 3 : middle], text[middle + 4 : end]
        new = f'emulate::launch("{kernel}", __PRETTY_FUNCTION__, {kernel}, emulate::Config({config}), {arguments});'
        text = text[:begin] + padded(new, text[begin:end]) + text[end + 2 :]
    return text


def shared_variables(text: str) -> str:
    """``extern __shared__`` arrays and ``__shared__`` variables."""
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];",
        r"\1* const \2 = emulate::dynamic_shared<\1>();",
        text,
    )

    def declare(match: re.Match[str]) -> str:
        first, *rest = split(match.group(1))
        if not (head := re.fullmatch(r"([\w:<> ]+?) (\w+)((?:\[[^\]]+\])*)", first)):
            raise TransformError(f"not a shared variable: {match.group()}")
        out = []
        for declarator in [first[len(head.group(1)) :].strip(), *rest]:
            name, dimensions = re.fullmatch(r"(\w+)(.*)", declarator, re.S).groups()  # type: ignore[union-attr]
            kind = f"emulate::SharedVariable<{head.group(1)}{dimensions}>"
            out.append(f"static {kind} shared_{name}; auto& {name} = shared_{name}.get();")
        return padded(" ".join(out), match.group())

    return re.sub(r"__shared__ ([^;]*);", declare, text)


def assembly(text: str) -> str:
    """``asm("op operands;" : outputs : inputs : clobbers);``"""
    while match := re.search(r"\basm\s*(?:volatile\s*)?\(", text):
        end = closing(text, match.end() - 1)
        statement, sections = text[match.start() : end], split(text[match.end() : end], ":")
        code = "".join(re.findall(r'"([^"]*)"', sections[0]))
        parsed = re.fullmatch(r"\s*([a-z][\w.:]*)\s*([^;]*);\s*", code)
        operands = [
            re.fullmatch(r'"[^"]*"\s*\((.*)\)', operand, re.S)
            for section in sections[1:3]
            for operand in filter(None, split(section))
        ]
        if not parsed or not all(operands) or text[end + 1] != ";":
            raise TransformError(f"not one PTX instruction: {statement}")
        arguments = [
            operands[int(token[1:])].group(1) if token.startswith("%") else token  # type: ignore[union-attr]
            for token in re.findall(r"%\d+|\b\d+\b", parsed.group(2))
        ]
        name = re.sub(r"[.:]+", "_", parsed.group(1))
        new = f"emulate::ptx::{name}({', '.join(arguments)});"
        text = text[: match.start()] + padded(new, statement) + text[end + 2 :]
    return text


def transform(text: str, path: Path) -> str:
    """The source of one file of csrc/cuda as plain C++, for inclusion of tests/emulate/cuda_runtime.h."""
    text = assembly(shared_variables(launches(text)))
    text = text.replace("torch::stable::accelerator::DeviceGuard", "emulate::DeviceGuard")
    text = re.sub(r"(STABLE_TORCH_LIBRARY_IMPL\(\w+), CUDA,", r"\1, CPU,", text)
    for leftover in ("<<<", "__shared__", "accelerator::"):
        if leftover in text:
            raise TransformError(f"{path.name}: {leftover} is left over")
    return f'#line 1 "{path}"\n{text}'
