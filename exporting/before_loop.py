"""What a pipeline does with its prompts, as one exported graph: from the numbers of tokens to what its model is given.

Nothing here knows a pipeline or a text encoder. The pipeline is called with texts of ours and watched: what its
tokenizers are given, how, and what the transformer is given then. So the text that a tokenizer gets is known as the
prompt and some preparation (:mod:`difa_compile.bundle.prompts`), and all that lies between tokenizers and transformer
is exported by calling the pipeline once more with the tokenizers' tensors as inputs. What does not depend on them
(timesteps, noise) is computed, not traced.

What was found is compared with the pipeline on awkward texts; where anything differs, there are no prompts.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import logging
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from difa_compile.bundle.agreement import difference
from difa_compile.bundle.manifest import ENCODES, KINDS, STEPS, Encoder, Prompts, Text, Tokens
from difa_compile.bundle.program import Program
from difa_compile.bundle.prompts import prepared, tokenizer_from, tokens_of
from difa_compile.errors import BeforeLoopError, MissingDependencyError, NotAppliedError, is_out_of_memory
from difa_compile.exporting.after_loop import CONSTANT, exported
from difa_compile.exporting.watching import Event, Outputs, Stop, Watch, put, untraced
from difa_compile.pipeline.transformers import check_scheduler, find_transformers
from difa_compile.pipeline.wiring import wiring_of
from difa_compile.wording import quoted, shown

ARGUMENT = re.compile("(negative_)?prompt(_[0-9]+)?")
"""Arguments of pipelines' calls that are texts."""
TRIED = (
    "",
    "a",
    "  A Red\tHOUSE,\n\n\u00a0two  small\u3000Boats.  ",
    "caf&eacute; &amp;lt;b&amp;gt; na\u00efve d\u00e9ja\u0300 vu",
    "\U0001f98a \u201cStra\u00dfe\u201d \u0391\u0398\u0397\u039d\u0391 \u6771\u4eac <b>x</b> 1,000 % don't (((stop)))",
    "\u00e2\u20ac\u0153mojibake\u00e2\u20ac\u009d \ufb01ne",
    "a red house, two small boats and a cat that walks on green grass " * 40,
)
"""Texts on which everything is tried: empty, with capitals and white space, names of characters, accents in two ways,
emoji, text that was decoded wrongly, and more than any tokenizer lets pass."""
CLOSE = 1e-5
"""What the graph makes of a text may differ by so much of the largest value from what the pipeline makes of it; or by
so many roundings of its dtype, where that is more."""
ROUNDINGS = 16
KEYS = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "types"}
"""Of what a tokenizer gives: what an engine can be given."""
assert set(KEYS.values()) == set(KINDS)


@dataclass(frozen=True, eq=False)
class Encoding:
    """``program.module()(*tensors)``: from what tokenizers make of one prompt, int64 ``(1, tokens)`` each, to the
    conditions that a model is given for an image, ``(1, *shape)`` each, in the order of ``inputs`` and ``outputs``,
    which hold those of the export's call. ``half``: whose conditions they are.

    Parameters and buffers have their names in the pipeline (``text_encoder.shared.weight``).
    """

    program: torch.export.ExportedProgram
    half: str
    inputs: Mapping[str, Tensor] = field(repr=False)
    outputs: Mapping[str, Tensor] = field(repr=False)

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of what is no weight of the pipeline among the program's parameters and buffers: masks, positions."""
        return tuple(name for name in self.program.state_dict if name.startswith(CONSTANT))


@dataclass(frozen=True, eq=False)
class BeforeLoop:
    """``prompts``: how engines of ``encodings`` are given texts. ``tokenizers``: their files' contents, by name."""

    prompts: Prompts
    encodings: tuple[Encoding, ...]
    tokenizers: Mapping[str, bytes] = field(repr=False)


def before_loop(pipe: Any, inputs: Mapping[str, Any], program: Program) -> BeforeLoop:
    """Export what ``pipe`` does from tokens to what its transformers are given in ``program``.

    ``inputs``: as for :func:`difa_compile.exporting.probing.probe`, of a call with a prompt that makes one image. The
    pipeline is called some twelve times with nothing in the transformer's place, and left as it was.

    Raises :class:`BeforeLoopError` where texts cannot be followed, or are encoded otherwise than by a graph of fixed
    sizes, and where anything that was found differs from the pipeline.
    """
    if wiring_of(pipe) is not None:
        raise NotAppliedError(f"this {type(pipe).__name__} carries a plan; call remove(pipe) before it is exported")
    check_scheduler(pipe)
    with torch.no_grad():
        return _Finding(pipe, inputs, program).found()


# --- one call, watched -----------------------------------------------------------------------------------------------


@dataclass
class _Use:
    """A call of a tokenizer: which component it is, its text, what it gave, and the tokenizer as it was set then."""

    component: str
    text: str
    special: bool
    tensors: dict[str, Tensor]
    content: str
    again: Callable[[str], Any]


@dataclass
class _Seen:
    """A call of the pipeline, up to its scheduler's first step. ``conditions``: by half and name."""

    texts: Mapping[str, str]
    uses: list[_Use]
    conditions: dict[str, dict[str, Tensor]]


class _Calls(nn.Module):
    """The pipeline's call up to its scheduler's first step, as a module of the pipeline's models.

    ``forward(*tensors)`` puts the tensors in the place of those that tokenizers give, ``self.places`` of them, and
    returns the conditions ``self.wanted``.
    """

    pipe: Any

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], program: Program) -> None:
        super().__init__()
        self.pipe, self.program = pipe, program
        parameters = inspect.signature(type(pipe).__call__).parameters
        self.arguments: dict[str, Any] = {**inputs, "num_inference_steps": program.steps}
        if "output_type" in parameters:
            self.arguments["output_type"] = "latent"
        self.takes_generator = "generator" in parameters
        self.listed = not isinstance(inputs.get("prompt"), str)
        find_transformers(pipe)
        names = dict.fromkeys(form.model for form in program.forms)
        self.models = {name: getattr(pipe, name) for name in names}
        self.tokenizers: dict[str, Any] = {}
        for name, component in getattr(pipe, "components", {}).items():
            if isinstance(component, nn.Module):
                self.add_module(name, component)
            elif callable(component) and callable(getattr(component, "convert_tokens_to_ids", None)):
                self.tokenizers[name] = component
        self.places: Sequence[tuple[int, str]] = ()
        self.wanted: tuple[str, Sequence[str]] = ("", ())
        self.free: frozenset[int] = frozenset()
        """Calls of tokenizers that are told an empty text: the length of a text would be asked, which no graph has."""

    def seen(self, texts: Mapping[str, str], *, alone: bool = False) -> _Seen:
        """What happens in a call with these texts in the place of the export's; ``alone``: with no others."""
        uses, conditions = self._run(texts, alone)
        return _Seen(texts, uses, conditions)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, conditions = self._run({}, False, dict(zip(self.places, tensors, strict=True)))
        half, names = self.wanted
        return tuple(conditions[half][name] for name in names)

    def _run(
        self, texts: Mapping[str, str], alone: bool, instead: Mapping[tuple[int, str], Tensor] | None = None
    ) -> tuple[list[_Use], dict[str, dict[str, Tensor]]]:
        uses: list[_Use] = []
        conditions: dict[str, dict[str, Tensor]] = {}

        def value(event: Event, given: Callable[[], Any] | None) -> Any:
            del given
            if event.kind != "call":
                return None
            form = next(each for each in self.program.forms if (each.model, each.branch) == event.form)
            sample = event.tensors[form.sample.name]
            rows = sample.shape[0] // form.groups
            for condition in form.conditions:
                tensor = event.tensors[condition.argument.name]
                parts = tensor.split(rows) if condition.argument.batched else (tensor,)
                for row, part in zip(condition.rows, parts, strict=True):
                    conditions.setdefault(row.half, {}).setdefault(condition.argument.name, part)
            with untraced():
                return Outputs((torch.zeros(sample.shape[0], *form.output, dtype=sample.dtype, device=sample.device),))

        def stop(*_: Any, **__: Any) -> Any:
            raise Stop

        def settle(original: Any, *given: Any, **options: Any) -> Any:
            with untraced():
                return original(*given, **options)

        scheduler = self.pipe.scheduler
        call = {name: value for name, value in self.arguments.items() if not (alone and ARGUMENT.fullmatch(name))}
        call |= {name: [text] if self.listed else text for name, text in texts.items()}
        if self.takes_generator:
            call["generator"] = torch.Generator().manual_seed(0)
        with ExitStack() as stack:
            for name, tokenizer in self.tokenizers.items():
                stack.enter_context(_heard(name, tokenizer, uses, instead, self.free))
            put(stack, scheduler, "step", stop, scheduler.step)
            setting = scheduler.set_timesteps
            put(stack, scheduler, "set_timesteps", functools.partial(settle, setting), setting)
            if instead is not None:
                stack.enter_context(_OnlyWhatFollows())
            stack.enter_context(_unlogged())
            Watch(self.pipe, self.models, value, True).run(call)
        return uses, conditions


@contextmanager
def _heard(
    name: str,
    tokenizer: Any,
    uses: list[_Use],
    instead: Mapping[tuple[int, str], Tensor] | None,
    free: frozenset[int],
) -> Iterator[None]:
    """Within this block calls of a tokenizer are noted, and what they give is exchanged. A class of its own in the
    place of the tokenizer's: pipelines hand tokenizers on, and ask what they are."""
    plain = type(tokenizer)

    def call(self: Any, text: Any = None, *rest: Any, **options: Any) -> Any:
        with untraced():
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, (list, tuple)) or len(texts) != 1 or not isinstance(texts[0], str) or rest:
                raise BeforeLoopError(f"{name} is called with {quoted(text, 60)}, where one text is expected")
            again = functools.partial(_called, plain, self, isinstance(text, str), options)
            number = len(uses)
            given = again("" if instead is not None and number in free else texts[0])
            items = given.items() if isinstance(given, Mapping) or hasattr(given, "items") else ()
            tensors = {key: item for key, item in items if isinstance(item, Tensor)}
            to_str = getattr(getattr(self, "backend_tokenizer", None), "to_str", None)
            content = to_str() if callable(to_str) else ""
            uses.append(_Use(name, texts[0], bool(options.get("add_special_tokens", True)), tensors, content, again))
        for (place, key), tensor in (instead or {}).items():
            if place == number:
                given[key] = tensor
        return given

    tokenizer.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    try:
        yield
    finally:
        tokenizer.__class__ = plain


@contextmanager
def _unlogged() -> Iterator[None]:
    """Within this block no warning is logged: pipelines warn of texts that are cut off, which ours are on purpose."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _called(kind: Any, tokenizer: Any, alone: bool, options: Mapping[str, Any], text: str) -> Any:
    """A tokenizer's own call with another text."""
    return kind.__call__(tokenizer, text if alone else [text], **options)


class _OnlyWhatFollows(TorchFunctionMode):
    """Within this block a tracer sees what is made of what it traces; all else is computed at once."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if any(map(_is_traced, tree_leaves((arguments, options)))):
            return function(*arguments, **options)
        with untraced():
            return function(*arguments, **options)


def _is_traced(value: object) -> bool:
    if isinstance(value, Tensor):
        return type(value) not in (Tensor, nn.Parameter, nn.Buffer)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


# --- one half of a graph ---------------------------------------------------------------------------------------------

_ALIKE = {
    torch.ops.aten.to.dtype, torch.ops.aten.to.device, torch.ops.aten.to.dtype_layout, torch.ops.aten._to_copy.default,
    torch.ops.aten.clone.default, torch.ops.aten.contiguous.default, torch.ops.aten.detach.default,
}  # fmt: skip
"""What does the same to every row."""


def _one_half(graph: torch.fx.Graph) -> None:
    """Let results that are rows of a batch of both halves be made of their own half, so that the other one is dead.

    The other half's text is a constant here; without this its encoder would be part of the engine. Checks of dtypes go:
    what they look at is never dead.
    """
    (output,) = graph.find_nodes(op="output")
    for node in [*graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default)]:
        graph.erase_node(node)
    for node in list(output.all_input_nodes):
        if node.target is not operator.getitem or node.args[0].target is not torch.ops.aten.split.Tensor:
            continue
        split, place = node.args
        whole, rows, *rest = split.args
        if rest not in ([], [0]) or split.kwargs or not isinstance(rows, int):
            continue
        path = []
        while whole.target in _ALIKE:
            path.append(whole)
            whole = whole.args[0]
        if whole.target is not torch.ops.aten.cat.default or whole.args[1:] not in ((), (0,)) or whole.kwargs:
            continue
        sizes = [part.meta["val"].shape[0] for part in whole.args[0]]
        if any(size != rows for size in sizes):
            continue
        found = whole.args[0][place]
        with graph.inserting_before(node):
            for each in reversed(path):
                found = graph.call_function(each.target, (found, *each.args[1:]), dict(each.kwargs))
        node.replace_all_uses_with(found)
    _cut_by_a_mask(graph)
    graph.eliminate_dead_code(is_impure_node=_is_impure)


def _cut_by_a_mask(graph: torch.fx.Graph) -> None:
    """Let what is cut to a length that is known when it runs, and filled up to its size with zeros, be zeros from there
    on: no size in the graph depends on a text then, which not every target could compile."""
    for cat in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts = cat.args[0]
        if len(parts) != 2 or parts[0].target is not torch.ops.aten.slice.Tensor:
            continue
        (cut, zeros), dim = parts, cat.args[1] if len(cat.args) > 1 else 0
        whole, along, first, length, *step = cut.args
        sizes = whole.meta["val"].shape
        zero = zeros.target in (torch.ops.aten.new_zeros.default, torch.ops.aten.zeros.default)
        counted = isinstance(length, torch.fx.Node) and length.target is torch.ops.aten.item.default
        if not zero or not counted or first not in (None, 0) or step or along % len(sizes) != dim % len(sizes):
            continue
        if cat.meta["val"].shape != sizes or not all(isinstance(size, int) for size in sizes):
            continue
        with graph.inserting_before(cat):
            place = [sizes[dim] if axis == dim % len(sizes) else 1 for axis in range(len(sizes))]
            numbers = graph.call_function(torch.ops.aten.arange.default, (sizes[dim],))
            numbers = graph.call_function(torch.ops.aten.view.default, (numbers, place))
            kept = graph.call_function(torch.ops.aten.lt.Tensor, (numbers, length.args[0]))
            nothing = graph.call_function(torch.ops.aten.zeros_like.default, (whole,))
            found = graph.call_function(torch.ops.aten.where.self, (kept, whole, nothing))
        cat.replace_all_uses_with(found)
    # Checks of such lengths go with them.
    for node in [*graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)]:
        graph.erase_node(node)


def _is_impure(node: torch.fx.Node) -> bool:
    """Whether a node does more than to give a value; random numbers, as attention and dropout may draw, are no more."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and (schema.is_mutable or not schema.returns))


# --- what is found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """A text given to a tokenizer: the number of the call, its argument, and what its tensors are called."""

    number: int
    argument: str
    label: str


class _Finding:
    """From a pipeline of which nothing is known to encodings that were compared with it."""

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], program: Program) -> None:
        self.inputs, self.program = inputs, program
        self.name = type(pipe).__name__
        if _text_of(inputs.get("prompt")) is None:
            raise BeforeLoopError("the call that is exported has no prompt, or several; give it one text")
        self.calls = _Calls(pipe, inputs, program)
        if not self.calls.tokenizers:
            raise BeforeLoopError(f"{self.name} has no component that is a tokenizer")
        halves = {row.half for form in program.forms for each in form.conditions for row in each.rows}
        if "cond" not in halves or not halves <= set(ENCODES):
            raise BeforeLoopError(f"which half of {self.name}'s guidance is the conditional one is not known")
        known = [name for name in inspect.signature(type(pipe).__call__).parameters if ARGUMENT.fullmatch(name)]
        self.arguments = {
            half: [name for name in known if name.startswith("negative") == (half == "uncond")]
            for half in ENCODES
            if half in halves
        }

    def found(self) -> BeforeLoop:
        own = self._seen({})
        self.calls.free = frozenset(number for number, use in enumerate(own.uses) if not _is_fixed(use))
        if len(self.calls.free) == len(own.uses):
            raise BeforeLoopError(
                f"no tokenizer of {self.name} makes as many numbers of any prompt; only prompts that are padded to a "
                "fixed length can be encoded by an engine"
            )
        uses, texts = self._uses(own)
        if not uses["cond"]:
            raise self._unknown("prompt")
        seen = [own, *self._tried(texts)]
        for each in seen:
            self._check_same(own, each)
        contents: dict[str, bytes] = {}
        encoders: list[Encoder] = []
        encodings: list[Encoding] = []
        for half, given in uses.items():
            wanted = self._wanted(half, seen)
            if not given or not wanted:
                continue
            tokens = [self._tokens(each, own, seen, contents) for each in given]
            made = next((each for each in encodings if self._fits(each, half, wanted, given, seen)), None)
            if made is None:
                made = self._encoding(half, wanted, given, own)
                difference = self._difference(made, half, given, seen)
                if not difference <= self._allowed(half, wanted, own):
                    raise BeforeLoopError(
                        f"the graph of how {self.name} encodes prompts does not give what the pipeline gives: it is "
                        f"off by {difference:.1e} of the largest value on awkward texts"
                    )
                encodings.append(made)
            encoders.append(Encoder(half, ENCODES[made.half], tuple(tokens)))
            if half == "uncond":
                self._defaults(given, tokens, own, texts)
        if [each.half for each in encoders][:1] != ["cond"]:
            raise BeforeLoopError(f"nothing that {self.name}'s model is given follows the prompt")
        used = {each.text for encoder in encoders for each in encoder.tokens}
        used |= {texts[name].follows for name in used} - {""}
        return BeforeLoop(
            Prompts({name: text for name, text in texts.items() if name in used}, tuple(encoders)),
            tuple(encodings),
            contents,
        )

    # Calls

    def _seen(self, texts: Mapping[str, str], *, alone: bool = False) -> _Seen:
        try:
            found = self.calls.seen(texts, alone=alone)
        except Exception as error:  # pipelines say in many ways what they do not take
            if is_out_of_memory(error) or isinstance(error, BeforeLoopError):
                raise
            raise BeforeLoopError(
                f"{self.name} cannot be called with texts of ours to see how it encodes them: {shown(error, 300)}"
            ) from error
        missing = [half for half in self.arguments if half not in found.conditions]
        if missing:
            raise BeforeLoopError(f"{self.name} does not call its model for the {missing[0]} half in its first step")
        return found

    def _check_same(self, own: _Seen, other: _Seen) -> None:
        if [use.component for use in own.uses] != [use.component for use in other.uses]:
            raise BeforeLoopError(f"which tokenizers {self.name} calls depends on the texts")
        for half, conditions in own.conditions.items():
            for name, tensor in conditions.items():
                if other.conditions[half][name].shape != tensor.shape:
                    raise BeforeLoopError(
                        f"the size of {name} follows the length of the text: it is {tuple(tensor.shape)} for the "
                        f"prompt of the export, and {tuple(other.conditions[half][name].shape)} for "
                        f"{quoted(next(iter(other.texts.values()), ''), 40)}"
                    )

    def _uses(self, own: _Seen) -> tuple[dict[str, list[_Given]], dict[str, Text]]:
        """By half the texts that tokenizers are given, and what is known of the arguments they come from."""
        marks = {name: f"qx{number}zk" for number, name in enumerate(itertools.chain(*self.arguments.values()))}
        bases = {half: next((name for name in names if not name[-1].isdigit()), "")
                 for half, names in self.arguments.items()}  # fmt: skip
        alone = self._seen({base: marks[base] for base in bases.values() if base}, alone=True)
        marked = self._seen(marks)
        for each in (alone, marked):
            self._check_same(own, each)
        found: dict[str, list[_Given]] = {half: [] for half in self.arguments}
        texts: dict[str, Text] = {}
        for number, use in enumerate(marked.uses):
            names = [name for name, mark in marks.items() if mark in use.text.lower()]
            if number in self.calls.free or not names:
                continue
            if len(names) > 1:
                raise BeforeLoopError(f"{use.component} is given {' and '.join(names)} as one text")
            (name,) = names
            half = next(half for half, each in self.arguments.items() if name in each)
            before = sum(own.uses[each.number].component == use.component for each in found[half])
            found[half].append(_Given(number, name, use.component + (f".{before + 1}" if before else "")))
            base = bases[half]
            if name != base and (not base or marks[base] not in alone.uses[number].text.lower()):
                raise BeforeLoopError(f"what {name} is where it is not given is not known")
            texts[name] = self._text(name, "" if name == base else base)
        for base in {text.follows for text in texts.values()} - {"", *texts}:
            texts[base] = self._text(base, "")
        return found, texts

    def _text(self, name: str, follows: str) -> Text:
        """A prompt has to be given; a negative one is what it was in the export's call."""
        given = _text_of(self.inputs.get(name))
        return Text(follows, given if name in self.arguments.get("uncond", ()) else None, given)

    def _defaults(self, uses: Sequence[_Given], tokens: Sequence[Tokens], own: _Seen, texts: dict[str, Text]) -> None:
        """What negative prompts are where the export's call gave none: what the tokenizers got."""
        for use, each in zip(uses, tokens, strict=True):
            text = texts[use.argument]
            got = own.uses[use.number].text
            inner = got.removeprefix(each.before).removesuffix(each.after)
            if text.default is None and not text.follows and prepared(inner, each) == got:
                texts[use.argument] = Text("", inner, None)

    def _tried(self, texts: Mapping[str, Text]) -> list[_Seen]:
        """Calls with awkward texts, another one for each argument."""
        found = []
        for start in range(len(TRIED)):
            given = {}
            for place, (name, text) in enumerate(texts.items()):
                chosen = TRIED[(start + place) % len(TRIED)]
                given[name] = chosen or ("two boats" if text.follows else "")  # an empty one would follow, too
            found.append(self._seen(given))
        return found

    # Texts

    def _tokens(self, given: _Given, own: _Seen, seen: Sequence[_Seen], contents: dict[str, bytes]) -> Tokens:
        """How a tokenizer is given texts; its file is added to ``contents``."""
        use = own.uses[given.number]
        tried = [(each.texts[given.argument], each.uses[given.number]) for each in seen if given.argument in each.texts]
        rule = _rule([(text, each.text) for text, each in tried])
        if rule is None:
            raise self._unknown(given.argument)
        if not use.content:
            raise BeforeLoopError(
                f"{use.component} of {self.name} is not backed by the library tokenizers; load it in its fast form"
            )
        content = use.content.encode()
        file = f"tokenizers/tokenizer-{hashlib.sha256(content).hexdigest()[:12]}.json"
        keys = {f"{given.label}.{KEYS[key]}": key for key in use.tensors if key in KEYS}
        steps, before, after = rule
        tokens = Tokens(
            file, given.argument, {name: KEYS[key] for name, key in keys.items()}, steps, before, after, use.special
        )
        tokenizer = tokenizer_from(content, file)
        for text, each in tried:
            for name, tensor in tokens_of(tokenizer, text, tokens).items():
                if not torch.equal(tensor, each.tensors[keys[name]].cpu().to(tensor.dtype)):
                    raise BeforeLoopError(
                        f"{use.component} of {self.name} makes other numbers of {quoted(text, 40)} than the library "
                        "tokenizers does with its file"
                    )
        contents[file] = content
        return tokens

    def _unknown(self, argument: str) -> BeforeLoopError:
        return BeforeLoopError(
            f"what {self.name} does to {argument} before it is tokenized is none of the simple ways that are known "
            f"({', '.join(STEPS)}); switch it off, if it is an argument of the call (clean_caption=False)"
        )

    # Graphs

    def _wanted(self, half: str, seen: Sequence[_Seen]) -> tuple[str, ...]:
        """The conditions of a half that follow the texts."""
        found = [
            name
            for name, tensor in seen[0].conditions[half].items()
            if any(not torch.equal(tensor, each.conditions[half][name]) for each in seen)
        ]
        batched = {each.argument.name: each.argument.batched for form in self.program.forms for each in form.conditions}
        if whole := [name for name in found if not batched[name]]:
            raise BeforeLoopError(f"{whole[0]} follows the prompt, and is one for all images of a call")
        return tuple(sorted(found))

    def _encoding(self, half: str, wanted: tuple[str, ...], uses: Sequence[_Given], own: _Seen) -> Encoding:
        inputs, places = {}, []
        for use in uses:
            for key, tensor in own.uses[use.number].tensors.items():
                if key in KEYS:
                    inputs[f"{use.label}.{KEYS[key]}"] = tensor.clone()
                    places.append((use.number, key))
        self.calls.places, self.calls.wanted = places, (half, wanted)
        arguments = tuple(inputs.values())
        try:
            program = exported(self.calls, arguments, tidy=_one_half)
            results = program.module()(*arguments)
        except Exception as error:  # whatever a tracer has against a pipeline's Python
            if is_out_of_memory(error):
                raise
            raise BeforeLoopError(
                f"how {self.name} encodes prompts cannot be exported as one graph: {type(error).__name__}: "
                f"{shown(error, 300)}"
            ) from error
        return Encoding(program, half, inputs, dict(zip(wanted, results, strict=True)))

    def _fits(
        self, made: Encoding, half: str, wanted: tuple[str, ...], uses: Sequence[_Given], seen: Sequence[_Seen]
    ) -> bool:
        """Whether the encoding of another half does for this one, too."""
        names = {f"{use.label}.{KEYS[key]}" for use in uses for key in seen[0].uses[use.number].tensors if key in KEYS}
        if names != set(made.inputs) or wanted != tuple(made.outputs):
            return False
        return self._difference(made, half, uses, seen) <= self._allowed(half, wanted, seen[0])

    def _allowed(self, half: str, wanted: Sequence[str], own: _Seen) -> float:
        dtypes = [own.conditions[half][name].dtype for name in wanted]
        return max(CLOSE, *(ROUNDINGS * torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype.is_floating_point), 0.0)

    def _difference(self, made: Encoding, half: str, uses: Sequence[_Given], seen: Sequence[_Seen]) -> float:
        """The largest difference from the pipeline's conditions in all calls, relative to the largest of each; infinite
        where what is not finite is not the same."""
        worst = 0.0
        run = made.program.module()
        for each in seen:
            tensors = {
                f"{use.label}.{KEYS[key]}": tensor
                for use in uses
                for key, tensor in each.uses[use.number].tensors.items()
                if key in KEYS
            }
            if any(tensors[name].shape != like.shape for name, like in made.inputs.items()):
                return math.inf
            results = run(*(tensors[name] for name in made.inputs))
            for name, found in zip(made.outputs, results, strict=True):
                worst = max(worst, difference(found, each.conditions[half][name]))
        return worst


def _text_of(value: Any) -> str | None:
    """The one text of an argument."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, str) else None


def _is_fixed(use: _Use) -> bool:
    """Whether a tokenizer makes as many numbers of any text, called as it was."""
    sizes = set()
    for text in TRIED:
        given = use.again(text)
        tensors = [given[key] for key in KEYS if key in use.tensors]
        if "input_ids" not in use.tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            return False
        sizes.add(tuple(tuple(tensor.shape) for tensor in tensors))
    return len(sizes) == 1 and all(len(shape) == 2 and shape[0] == 1 for shape in next(iter(sizes)))


def _rule(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], str, str] | None:
    """The fewest steps that make of each text what the tokenizer was given, and what stands before and after it."""
    longest = max(pairs, key=lambda pair: len(pair[0]))
    for count in range(len(STEPS) + 1):
        for steps in itertools.combinations(STEPS, count):
            plain = Tokens("", "", {}, steps)
            try:
                before, middle, after = longest[1].partition(prepared(longest[0], plain))
            except MissingDependencyError:  # then the pipeline cannot do it either
                continue
            whole = msgspec.structs.replace(plain, before=before, after=after)
            if middle and all(prepared(text, whole) == got for text, got in pairs):
                return steps, before, after
    return None
