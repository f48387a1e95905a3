"""Recipes: passes with their options in a YAML file, run in turn, and replayed from their plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxprune import io
from onnxprune.errors import InvalidRecipeError, OnnxPruneError, VerificationError
from onnxprune.plan import fingerprint
from onnxprune.progress import Progress, Silent
from onnxprune.recipe_steps import Context, step_types

FORMAT, VERSION = "onnxprune-recipe-plan", 1
_FIELDS = ("data", "val", "seed", "threads", "steps")


@dataclass(frozen=True)
class Recipe:
    """Steps in order, each a name and an instance with its options; and what they share."""

    steps: tuple[tuple[str, Any], ...]
    data: str | None = None
    val: str | None = None
    seed: int = 0
    threads: int | None = 1

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a YAML file.

        Raises:
            InvalidRecipeError: it is malformed; says line and field.
        """
        if not path.is_file():
            raise InvalidRecipeError(f"recipe '{path}': no such file")
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidRecipeError(f"recipe '{path}': this is not text") from error
        except InvalidRecipeError as error:
            raise InvalidRecipeError(f"recipe '{path}', {error}") from error

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read YAML text.

        Raises:
            InvalidRecipeError: it is malformed; says line and field.
        """
        import yaml

        try:
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
            value = yaml.safe_load(text)
            lines: dict[tuple[Any, ...], int] = {}
            if tree is not None:
                _note_lines(tree, (), lines)
            lines.setdefault((), 1)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            raise _no_yaml(text, error) from error
        return cls.of(value, lines)

    @classmethod
    def of(cls, value: Any, lines: Mapping[tuple[Any, ...], int] | None = None) -> Recipe:
        """A recipe from plain values: the fields of the YAML file.

        Raises:
            InvalidRecipeError: says which field.
        """
        where = _Where(lines or {})
        if not isinstance(value, Mapping) or not isinstance(value.get("steps"), list):
            raise where.error((), "a recipe has a list `steps`")
        for key in value:
            if key not in _FIELDS:
                raise where.error((key,), f"{key}: no such field; choose {', '.join(_FIELDS)}")
        known = step_types()
        steps = tuple(
            _step(item, ("steps", i), where, known) for i, item in enumerate(value["steps"])
        )
        if not steps:
            raise where.error(("steps",), "steps: there are none")
        rest = {k: v for k, v in value.items() if k != "steps"}
        shared = _validated(_Shared, rest, (), where, "")
        if shared.seed < 0:
            raise where.error(("seed",), f"seed: must not be negative, not {shared.seed}")
        return cls(steps, **asdict(shared))


@dataclass(frozen=True)
class _Shared:
    data: str | None = None
    val: str | None = None
    seed: int = 0
    threads: int | None = 1


@dataclass(frozen=True)
class _Where:
    """Lines of a YAML file by the path of keys and positions."""

    lines: Mapping[tuple[Any, ...], int]

    def error(self, path: tuple[Any, ...], words: str) -> InvalidRecipeError:
        """An error that names the line of `path`, or of what it is in."""
        for length in range(len(path), -1, -1):
            line = self.lines.get(path[:length])
            if line is not None:
                return InvalidRecipeError(f"line {line}: {words}")
        return InvalidRecipeError(words)


def _no_yaml(text: str, error: Exception) -> InvalidRecipeError:
    """Where text is no YAML, in one line."""
    mark = getattr(error, "problem_mark", None)
    place = getattr(error, "position", None)
    line = 1 + (mark.line if mark else text.count("\n", 0, place) if place else 0)
    words = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    if isinstance(error, RecursionError):
        words = "it contains itself"
    return InvalidRecipeError(f"line {line}: this is not YAML: {' '.join(words.split())}")


def _note_lines(node: Any, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> None:
    import yaml

    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _note_lines(item, (*path, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, (*path, i), lines)


def _step(
    item: Any, path: tuple[Any, ...], where: _Where, known: Mapping[str, Any]
) -> tuple[str, Any]:
    """`name`, or `name: {options}`."""
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise where.error(path, "a step is a name, or a name with options: prune: {macs: 0.5}")
    name, options = next(iter(item.items()))
    if name not in known:
        raise where.error(path, f"no step {name!r}; choose {', '.join(sorted(known))}")
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise where.error((*path, name), f"{name}: options are `name: value` pairs")
    return name, _validated(known[name], options, (*path, name), where, f"{name}: ")


def _validated(
    kind: Any, options: Mapping[str, Any], path: tuple[Any, ...], where: _Where, prefix: str
) -> Any:
    """An instance of the dataclass `kind`."""
    from onnxprune.validation import FieldError, validated

    try:
        return validated(kind, options)
    except FieldError as error:
        raise where.error((*path, *error.path), f"{prefix}{error}") from error


@dataclass(frozen=True)
class RecipeResult:
    """The last model; `plan` holds what each step was asked for and did, as JSON values."""

    original: onnx.ModelProto
    model: onnx.ModelProto
    plan: Mapping[str, Any]


def run_recipe(
    source: str | Path | onnx.ModelProto, recipe: Recipe, *, progress: Progress | None = None
) -> RecipeResult:
    """Run every step in turn.

    Raises:
        OnnxPruneError: a step failed; says which.
    """
    original = model = io.load(source)
    listener = progress or Silent()
    context = Context(original, recipe.data, recipe.val, recipe.seed, recipe.threads, listener)
    done = []
    for number, (name, step) in enumerate(recipe.steps, 1):
        try:
            model, record = step(model, context)
        except OnnxPruneError as error:
            raise type(error)(f"step {number}, {name}: {error}") from error
        done.append({"step": name, "options": asdict(step), "record": record})
    plan = {
        "format": FORMAT,
        "version": VERSION,
        "model": {**fingerprint(original), "sha256": digest(original)},
        "data": recipe.data,
        "val": recipe.val,
        "seed": recipe.seed,
        "threads": recipe.threads,
        "steps": done,
        "result_sha256": digest(model),
    }
    return RecipeResult(original, model, json.loads(json.dumps(plan, default=_plain)))


def _plain(value: Any) -> str:
    """Paths as text; anything else cannot be in a plan."""
    if isinstance(value, Path):
        return str(value)
    raise InvalidRecipeError(f"a plan cannot hold {type(value).__name__}: give the name of a file")


def digest(model: onnx.ModelProto) -> str:
    """The SHA-256 of a model's bytes."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def is_recipe_plan(value: Any) -> bool:
    """Whether a JSON value is the plan of a recipe."""
    return isinstance(value, Mapping) and value.get("format") == FORMAT


def replay(
    source: str | Path | onnx.ModelProto,
    plan: Mapping[str, Any],
    *,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """The model that a recipe's plan was written for, byte by byte, from the same model and data.

    Raises:
        InvalidRecipeError: the plan belongs to another model or version.
        VerificationError: the result is another one than the plan says.
    """
    if plan.get("version") != VERSION:
        raise InvalidRecipeError(
            f"the plan has version {plan.get('version')!r}; this onnxprune reads {VERSION}"
        )
    try:
        fields = {
            **{k: plan[k] for k in ("data", "val", "seed", "threads")},
            "steps": [{step["step"]: step["options"]} for step in plan["steps"]],
        }
        name, sha256, wanted = plan["model"]["name"], plan["model"]["sha256"], plan["result_sha256"]
    except (KeyError, TypeError) as error:
        raise InvalidRecipeError(
            f"the plan is damaged ({type(error).__name__}: {error}): give a file that run --plan "
            "wrote"
        ) from error
    original = io.load(source)
    if sha256 != digest(original):
        raise InvalidRecipeError(f"the plan was made for another model ({name!r})")
    result = run_recipe(original, Recipe.of(fields), progress=progress)
    if result.plan["result_sha256"] != wanted:
        raise VerificationError(
            "the replay gave another model than the plan was written for: the data, the machine or "
            "a library has changed; use the same, or run the recipe again"
        )
    return result.model
