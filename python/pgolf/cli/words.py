"""The package's errors speak Python ("pass data=", "val_docs is 0"); on the shell they name the command's options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, get_args, get_origin

from typer.models import OptionInfo

# Arguments of the package whose options have other names.
_OTHER_NAMES = {"limit_seconds": "--time-limit", "margin_nats": "--margin"}


def options_of(command: Callable[..., None]) -> dict[str, str]:
    """The options of a command by the names that the package's arguments have: {"seq_len": "--seq-len", …}."""
    found: dict[str, str] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if get_origin(parameter.annotation) is not Annotated:
            continue
        for info in get_args(parameter.annotation)[1:]:
            if isinstance(info, OptionInfo):
                declared = (info.default, *(info.param_decls or ()))
                names = (name for text in declared if isinstance(text, str) for name in text.split("/"))
                found |= {name[2:].replace("-", "_"): name for name in names if name.startswith("--")}
    return {**found, **{name: option for name, option in _OTHER_NAMES.items() if option in found.values()}}


def in_shell_words(sentence: str, options: Mapping[str, str]) -> str:
    """A sentence with the arguments that it names as the command's options; what is not an option stays as it is.

    Names stand where the package's sentences have them: "x is …", "x=…", "pass x=", "give x", "(x=True, --x)". A word
    of the language ("The device is", "train.seed is") is none.
    """
    if not options:
        return sentence

    def option(found: re.Match[str]) -> str:
        return options[found["name"]]

    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    name = rf"(?P<name>{names})"
    sentence = re.sub(rf"\b{name}=True, (?=--)", "", sentence)
    sentence = re.sub(rf"\bpass {name}=", lambda found: f"give {option(found)}", sentence)
    sentence = re.sub(rf"(?<=\bgive ){name}\b(?!=)", option, sentence)
    sentence = re.sub(rf"(?<![\w.-]){name}=(?=[\w'\"])", lambda found: f"{option(found)} ", sentence)
    return re.sub(rf"(?<![\w.-])(?<!\bThe )(?<!\bthe ){name}(?= is (?:[\d'\"-]|None\b))", option, sentence)
