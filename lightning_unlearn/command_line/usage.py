"""What a person reads when options are wrong: one sentence, instead of all options and a tree of types."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from omegaconf.errors import OmegaConfBaseException

# Whose classes are named to whoever asks for one that is none.
PACKAGE = "lightning_unlearn."
# What jsonargparse says around the reason.
_AROUND = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Problem with given class_path",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    # A word that an option takes beside the names of classes.
    "Expected a typing.Literal['auto', 'unlearning']",
    "object_type=",
)
# How it says that a name is no class's.
_NO_CLASS = "Expected a dot import path string: "


def sentence(message: str, bases: Mapping[str, type] | None = None) -> str:
    """The reason in jsonargparse's message, with the option it is about.

    Args:
        message: A sentence or a tree, one branch for each type that an option may have.
        bases: The last word of an option to the class that its values derive from; those of this package are named
            where a value is none.

    Returns:
        One line.

    Example:
        >>> sentence('''Parser key "data":
        ...   Errors:
        ...     - Problem with given class_path 'Data':
        ...         Parser key "draws":
        ...           Expected a <class 'int'>. Got value: many
        ...     - Expected a <class 'NoneType'>''')
        'data.draws: Expected a whole number. Got value: many'
    """
    option: list[str] = []
    reasons: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if key := re.match(r'Parser key "([^"]+)"[^:]*:\s*', text):
            option.append(key[1])
            text = text[key.end() :]
        if text and not text.startswith(_AROUND) and text not in reasons:
            reasons.append(text)
    said = "; ".join(reasons) or " ".join(message.split())
    base = (bases or {}).get(option[-1].rpartition(".")[2]) if option else None
    if reasons and reasons[0].startswith(_NO_CLASS):
        said = _no_class(reasons[0].removeprefix(_NO_CLASS), option, base)
    return _in_words(f"{'.'.join(option)}: {said}" if option else said)


def _no_class(name: str, option: list[str], base: type | None) -> str:
    """What is wrong with a name that is no class's."""
    last = option[-1].rpartition(".")[2] if option else ""
    if name in ("auto", "unlearning"):  # of --method: the default, and the one whose settings are those of the model
        return f"{name} has no settings here; name the method that has them first, as --{last} NAME"
    if base is None:
        return f"{name!r} is nothing that it takes; its settings are given one by one, as --….{last}.NAME VALUE"
    return f"There is no class {name}; take {', '.join(_known(base))}, or the import path of a class of yours"


def _in_words(said: str) -> str:
    """A sentence without Python's ways to write types, and with a remedy where one is plain."""
    said = re.sub(r"<class '([\w.]+)'>", r"\1", said)
    said = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", said).replace("Expected a one of", "Expected one of")
    said = said.replace("Expected a int.", "Expected a whole number.").replace(
        "Expected a float.", "Expected a number."
    )
    said = said.replace("Expected a bool.", "Expected true or false.").replace("Expected a str.", "Expected a text.")
    if re.search(r"arguments are required: (fit\.|predict\.)?data, ", said):
        said += "; give a file that has them, as --config sample.yaml"
    elif config := re.search(r"unrecognized arguments: (\S+\.ya?ml)", said):
        said += f"; write --config {config[1]}"
    return said


def _known(base: type) -> list[str]:
    """The classes of this package that derive from a class, in the order of the alphabet."""
    derived: list[type] = base.__subclasses__()
    found = [name for one in derived for name in _known(one)]
    named = base.__module__.startswith(PACKAGE) and not base.__name__.startswith("_")
    return sorted({*found, *([base.__name__] if named and not inspect.isabstract(base) else [])})


def foreign_class(message: str) -> str | None:
    """A class of ``pytorch_lightning`` that a message names.

    Args:
        message: Jsonargparse's, of a class that is not what it should be; it has been imported already.

    Returns:
        Its dotted name, or ``None``.
    """
    for name in re.findall(r"[A-Za-z_][\w.]*\.\w+", message):
        module, _, attribute = name.rpartition(".")
        found = getattr(sys.modules.get(module), attribute, None)
        if isinstance(found, type) and any(base.__module__.startswith("pytorch_lightning.") for base in found.__mro__):
            return str(name)
    return None


class OneSentence:
    """Mixed into a jsonargparse parser.

    Attributes:
        bases: See :func:`sentence`.
    """

    bases: ClassVar[Mapping[str, type]] = {}
    exit_on_error: bool
    prog: str

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse; a YAML file that is no text, too deep or has an interpolation that leads nowhere is like others wrong.

        Args:
            *args: Jsonargparse's.
            **kwargs: Jsonargparse's.

        Returns:
            The settings.
        """
        parser: Any = super()
        try:
            return parser.parse_args(*args, **kwargs)
        except OmegaConfBaseException as error:
            return self.error(str(error))
        except UnicodeDecodeError as error:
            return self.error(f"A config must be text in UTF-8, but byte {error.start} of one is not; save it as that")
        except RecursionError:
            return self.error("A config is nested too deeply to be one; check it")

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Say what is wrong and leave.

        Args:
            message: Jsonargparse's.
            ex: What it comes from.

        Returns:
            Never.
        """
        parser: Any = super()
        if not self.exit_on_error:  # a parser within a parser
            return parser.error(message, ex)
        command = self.prog.replace(" [options]", "")
        foreign = foreign_class(message)
        if foreign is not None:
            said = (
                f"{foreign} derives from pytorch_lightning, whose classes are not those of lightning.pytorch; "
                "import lightning.pytorch in its file instead."
            )
        else:
            said = f"{sentence(message, self.bases)} (options: {command} --help)."
        return parser.exit(2, f"{command}: {said}\n")
