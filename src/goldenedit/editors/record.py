"""What is known of an editor beside its maths, in its own file: the record, the decorator and the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.options import TrainingOptions, check_fields, resolved
from goldenedit.registry import Registry

Learns = Literal["values", "gradients", "training"]
AnswerLoss = Literal["masked", "last"]
Function = TypeVar("Function", bound=Callable[..., Any])
VECTORS = ("mlp", "attention")

# Constants of EditConfig that an editor may read, by the words of `Editor.reads`.
READABLE: dict[str, tuple[str, ...]] = {
    "covariance": ("covariance", "covariance_tokens"),
    "ridge": ("ridge",),
    "anchor": ("anchor_bare_prompt",),
    "contrast": ("contrast", "contrast_weight"),
    "dense_tolerance": ("dense_tolerance",),
}


@dataclass(frozen=True)
class NoOptions:
    """The options of an editor that has none."""


def _has_no_default(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


@dataclass(frozen=True)
class Editor:
    """An editor: its maths, and what the rest of the library must know to ask it.

    Attributes:
        name: Its name in `EditConfig.method`.
        function: The maths: from a `Problem` to a `LowRankDelta`, or to a dense change `(d_out, d_in)`; with
            `learns="gradients"` from a `GradientProblem`; with `learns="training"` from a `TrainingProblem` to the
            change that is trained (see docs/extending.md).
        paper: Where the formula stands.
        options: Dataclass of its options; with `learns="training"` one that extends `TrainingOptions`.
        learns: What it needs: optimized values under keys, gradients at the answers, or training of its own.
        reads: Which constants of EditConfig it reads: words of `READABLE`. Nothing else is computed or shown.
        takes_identity: Whether it works without key statistics, `covariance="identity"`.
        vectors: Whose outputs are optimized for it; those of attention only help to find the MLP's.
        remembers_keys: Whether later edits are given the keys of earlier ones, as `Problem.previous`.
        inserts_batches: Whether it is made for many facts at once: benchmarks then insert them so.
        loss: Of a trained editor: cross entropy of the answer's tokens, each behind those before it, or of all of them
            at the prompt's last token.
        published: Whose layers a paper's tables would take: `"rome"`, `"memit"` or `"ft"`; None where nothing is.
    """

    name: str
    function: Callable[..., Any]
    paper: str = ""
    options: type[Any] = NoOptions
    learns: Learns = "values"
    reads: tuple[str, ...] = ()
    takes_identity: bool = True
    vectors: tuple[str, ...] = ("mlp",)
    remembers_keys: bool = False
    inserts_batches: bool = False
    loss: AnswerLoss = "masked"
    published: str | None = None

    def __post_init__(self) -> None:
        for attribute, choices in (("reads", tuple(READABLE)), ("vectors", VECTORS)):
            words = getattr(self, attribute)
            if isinstance(words, str) or not set(words) <= set(choices):
                raise ValueError(f"{attribute} of the editor {self.name!r} is a tuple of {choices}, not {words!r}.")
        if self.learns not in get_args(Learns):
            raise ValueError(f"The editor {self.name!r} learns from one of {get_args(Learns)}, not {self.learns!r}.")
        if not is_dataclass(self.options) or any(_has_no_default(entry) for entry in fields(self.options)):
            raise ValueError(f"The options of the editor {self.name!r} are a dataclass whose fields all have defaults.")
        if self.learns == "training" and not issubclass(self.options, TrainingOptions):
            raise ValueError(f"The editor {self.name!r} trains: its options must extend TrainingOptions.")

    @property
    def constants(self) -> tuple[str, ...]:
        """The constants of EditConfig that it reads, by name."""
        return tuple(name for word in self.reads for name in READABLE[word])

    @property
    def fields(self) -> dict[str, Field[Any]]:
        """Its options by name."""
        return {entry.name: entry for entry in fields(self.options)}

    def check_options(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError where it has no such option, or a value is out of bounds."""
        if unknown := sorted(set(values) - set(self.fields)):
            raise ValueError(
                f"The editor {self.name!r} has no option {unknown[0]!r}; its options are {sorted(self.fields)}."
            )
        check_fields(f"EditConfig(method={self.name!r}).options", self.fields, values)
        try:
            self.options(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The options {dict(values)} of the editor {self.name!r} are refused: {error}") from error

    def solve(self, problem: Any) -> LowRankDelta | Tensor:
        """Return the change of weights that the maths makes of a problem, in float32.

        Raises:
            TypeError: The maths returned neither factors nor a matrix.
        """
        change = self.function(problem)
        if isinstance(change, LowRankDelta):
            return replace(change, A=change.A.float(), B=change.B.float())
        if isinstance(change, Tensor):
            return change.float()
        raise TypeError(
            f"The editor {self.name!r} returned {type(change).__name__}: return a LowRankDelta, or the change as a "
            "tensor (d_out, d_in)."
        )

    def resolve(self, values: Mapping[str, Any], relative_constants: bool, problem: Any) -> Any:
        """Return the options as the maths reads them, from what a user set and the units of a problem."""
        return resolved(self.options(**values), relative_constants, problem.unit)


EDITORS: Registry[Editor] = Registry("editor", "goldenedit.editors", "goldenedit.editors")


def editor(name: str, **record: Any) -> Callable[[Function], Function]:
    """Register a function as the editor of a name; the other arguments are those of `Editor`.

    Example:
        ```python
        >>> from goldenedit.editors import LowRankDelta, Problem, editor
        >>> @editor("plain")
        ... def plain(problem: Problem) -> LowRankDelta:
        ...     K = problem.keys
        ...     return LowRankDelta(K.T / K.square().sum(0)[:, None], problem.residuals)
        ```

    Raises:
        ValueError: The name is taken.
    """

    def register(function: Function) -> Function:
        EDITORS.add(Editor(name, function, **record))
        return function

    return register
