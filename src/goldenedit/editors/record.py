"""The record of an editor, the decorator that registers it, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.options import TrainingOptions, check_fields, resolved
from goldenedit.registry import Registry

Learns = Literal["values", "gradients", "training"]
AnswerLoss = Literal["masked", "last", "ended"]
Function = TypeVar("Function", bound=Callable[..., Any])
VECTORS = ("mlp", "attention")

# Constants of EditConfig that an editor may read, by the words in `Editor.reads`.
READABLE: dict[str, tuple[str, ...]] = {
    "covariance": ("covariance", "covariance_tokens"),
    "ridge": ("ridge",),
    "anchor": ("anchor_bare_prompt",),
    "contrast": ("contrast", "contrast_weight"),
    "output_gradients": ("covariance", "covariance_tokens"),
    "dense_tolerance": ("dense_tolerance",),
}


@dataclass(frozen=True)
class NoOptions:
    """Options of an editor without options."""


def _has_no_default(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


@dataclass(frozen=True)
class Editor:
    """An editor: its maths, and what the library must know to call it.

    Attributes:
        name: The value of `EditConfig.method` that selects it.
        function: The maths. By default it turns a `Problem` into a `LowRankDelta` or a dense change `(d_out, d_in)`.
            With `learns="gradients"` it takes a `GradientProblem` instead. With `learns="training"` it takes a
            `TrainingProblem` and returns a change to train (see docs/extending.md).
        paper: Paper and equation of the formula.
        options: Dataclass of its options. With `learns="training"` it extends `TrainingOptions`.
        learns: What the editor needs: optimized values under keys, gradients at the answers, or training.
        reads: The constants of EditConfig that it reads, as words of `READABLE`. Others are neither computed nor shown.
        takes_identity: Whether it works without key statistics, with `covariance="identity"`.
        vectors: The modules whose outputs are optimized. Vectors of attention are never stored.
        remembers_keys: Whether later edits read the keys of earlier edits, as `Problem.previous`.
        inserts_batches: Whether it is made for many facts at once. Benchmarks then insert all facts in one batch.
        loss: The loss of a trained editor. `"masked"`: cross entropy of each token of the answer after the tokens
            before it. `"last"`: cross entropy of all its tokens at the prompt's last token. `"ended"`: as `"masked"`,
            and the token that ends the answer counts as one of its tokens.
        published: Which published layers apply: those for `"rome"`, `"memit"`, `"ft"` or `"locft"`; None if no paper
            names any.
        gates: Whether neurons of MLPs are rewritten for subjects and facts (see `goldenedit.editors.gated`). The
            function solves the problem where that is not possible.
        pattern: The layers that `EditConfig(layer_pattern="auto")` edits: `"golden"`, `"ladder"` or `"upper"`.
        version: Version of its maths. Scores of layers that another version was measured for are not used.
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
    gates: bool = False
    pattern: str = "golden"
    version: int = 1

    def __post_init__(self) -> None:
        for attribute, choices in (("reads", tuple(READABLE)), ("vectors", VECTORS)):
            words = getattr(self, attribute)
            if isinstance(words, str) or not set(words) <= set(choices):
                raise ValueError(
                    f"{attribute} of the editor {self.name!r} must be a tuple of words in {choices}, got {words!r}."
                )
        kinds_of = {"learns": get_args(Learns), "loss": get_args(AnswerLoss), "pattern": ("golden", "ladder", "upper")}
        for attribute, kinds in kinds_of.items():
            if getattr(self, attribute) not in kinds:
                raise ValueError(
                    f"{attribute} of the editor {self.name!r} must be one of {kinds}, got {getattr(self, attribute)!r}."
                )
        if (
            not isinstance(self.options, type)
            or not is_dataclass(self.options)
            or any(_has_no_default(entry) for entry in fields(self.options))
        ):
            raise ValueError(f"options of the editor {self.name!r} must be a dataclass whose fields all have defaults.")
        if self.learns == "training" and not issubclass(self.options, TrainingOptions):
            raise ValueError(f"options of the editor {self.name!r}, which trains, must extend TrainingOptions.")
        if self.learns != "training" and "output_gradients" in self.reads:
            raise ValueError(
                f"The editor {self.name!r} reads 'output_gradients', which only editors with learns='training' get."
            )

    @property
    def reads_statistics(self) -> bool:
        """Whether it inserts values, or trains, with the help of key statistics."""
        return self.learns != "gradients" and "covariance" in self.reads

    @property
    def reads_output_gradients(self) -> bool:
        """Whether it trains with the help of gradients at the outputs of the edited map."""
        return "output_gradients" in self.reads

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the constants of EditConfig that the editor reads."""
        return tuple(dict.fromkeys(name for word in self.reads for name in READABLE[word]))

    @property
    def fields(self) -> dict[str, Field[Any]]:
        """Fields of the options, by name."""
        return {entry.name: entry for entry in fields(self.options)}

    def check_options(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError if an option is unknown or its value is out of bounds."""
        if unknown := sorted(set(values) - set(self.fields)):
            raise ValueError(
                f"The editor {self.name!r} has no option {unknown[0]!r}. Its options are {sorted(self.fields)}."
            )
        check_fields(f"EditConfig(method={self.name!r}).options", self.fields, values)
        try:
            self.options(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The editor {self.name!r} refuses the options {dict(values)}: {error}") from error

    def solve(self, problem: Any) -> LowRankDelta | Tensor:
        """Return the change of weights that solves a problem, in float32.

        Raises:
            TypeError: The function returned neither a LowRankDelta nor a tensor.
        """
        change = self.function(problem)
        if isinstance(change, LowRankDelta):
            return replace(change, A=change.A.float(), B=change.B.float())
        if isinstance(change, Tensor):
            return change.float()
        raise TypeError(
            f"The editor {self.name!r} returned {type(change).__name__}. Return a LowRankDelta, or the change as a "
            "tensor (d_out, d_in)."
        )

    def resolve(self, values: Mapping[str, Any], relative_constants: bool, problem: Any) -> Any:
        """Return the options as the maths reads them, from the user's values and the units of a problem."""
        return resolved(self.options(**values), relative_constants, problem.unit)


EDITORS: Registry[Editor] = Registry("editor", "goldenedit.editors", "goldenedit.editors")


def editor(name: str, **record: Any) -> Callable[[Function], Function]:
    """Register a function as the editor `name`. The other keyword arguments are those of `Editor`.

    Example:
        ```python
        >>> from goldenedit.editors import LowRankDelta, Problem, editor
        >>> @editor("plain")
        ... def plain(problem: Problem) -> LowRankDelta:
        ...     K = problem.keys
        ...     return LowRankDelta(K.T / K.square().sum(0)[:, None], problem.residuals)
        ```

    Raises:
        ValueError: Another editor has this name.
    """

    def register(function: Function) -> Function:
        EDITORS.add(Editor(name, function, **record))
        return function

    return register
