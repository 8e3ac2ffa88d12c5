"""ElasticNet: a model whose widths, kernels and depths can be switched at every step, and its decisions about them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from quant.convert import quantized_class, run_model
from quant.elastic.blocks import Stage, find_stages, freeze_block, make_skippable
from quant.elastic.channels import Channels, find_channels
from quant.elastic.heads import find_heads
from quant.elastic.importance import order_by_importance
from quant.elastic.layers import Elastic, ElasticConv2d, Size, can_be_elastic, freeze_size, make_elastic, plain_class
from quant.elastic.saved import NOTE
from quant.errors import UserError
from quant.module_utils import evaluating
from quant.quant_module import QuantModule
from quant.quantizers.narrowing import narrow

Kind = Literal["width", "heads", "kernel", "depth"]
UNITS: Mapping[Kind, str] = {"width": "channels", "heads": "heads", "kernel": "kernel side", "depth": "blocks"}


@dataclass(frozen=True)
class StructureDecision:
    """One choice about the architecture."""

    name: str
    """First layer or block that it concerns."""
    kind: Kind
    choices: tuple[int, ...]
    """Channels (of heads, too), side of the kernel, or number of blocks, from small to large."""
    whole: int
    """What the model has."""
    unit: int = 1
    """Channels of one head."""

    def describe(self, index: int) -> str:
        """Return a choice as the record holds it: '8 of 16 channels'."""
        return f"{self.choices[index] // self.unit} of {self.whole // self.unit} {UNITS[self.kind]}"


@dataclass(frozen=True)
class LayerParts:
    """Indices of the decisions that a layer's size depends on; None: on none."""

    out: int | None = None
    read: int | None = None
    kernel: int | None = None
    depth: int | None = None
    place: int = 0
    """Position of the layer's block in its stage: it is kept if the stage keeps more blocks."""

    @property
    def decisions(self) -> tuple[int, ...]:
        """The different decisions among them."""
        named = (self.out, self.read, self.kernel, self.depth)
        return tuple(dict.fromkeys(index for index in named if index is not None))


class ElasticNet:
    """A model with elastic layers and blocks; starts at its largest choice.

    Channels that depend on each other and blocks that can be left out are found in one forward pass, see
    `quant.elastic.channels` and `quant.elastic.blocks`. The model may be quantized afterwards.

    Args:
        model: Any model; changed in place. At the full width and kernel its outputs stay the same.
        example: A batch, from which the importance of channels is computed as well.
        widths: Shares of the channels that layers may keep, and of the heads of attentions.
        kernels: Odd sides of kernels to choose from, for depthwise convolutions, or for all if there are none.
        depths: Numbers of blocks that a stage may keep, beside all of them.
        layers: Layers whose cost counts; widths that concern none of them stay. None: all count.

    Raises:
        UserError: If the model offers no choice, or a choice is not within the model.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        widths: Sequence[float] = (1.0,),
        kernels: Sequence[int] = (),
        depths: Sequence[int] = (),
        layers: Collection[str] | None = None,
    ) -> None:
        check_choices(widths, kernels, depths)
        self.model = model
        self.decisions: list[StructureDecision] = []
        self.parts: dict[str, LayerParts] = {}
        """Layer or norm -> the decisions that it depends on."""
        self.whole: dict[str, Size] = {}
        """The same -> its size in the whole model."""
        self.stored: dict[str, tuple[int, ...]] = {}
        """The same -> shape of its weight in the whole model."""
        self.blocks: dict[str, tuple[int, int]] = {}
        """Block -> (decision, its place in the stage)."""
        channels = [*find_channels(model, example), *find_heads(model, example)] if min(widths) < 1 else []
        if layers is not None:
            channels = [c for c in channels if not {*c.writers, *c.readers, *c.followers}.isdisjoint(layers)]
        stages = find_stages(model, example) if depths else []
        order_by_importance(model, channels, example)
        self._add_widths(channels, widths)
        self._add_kernels(kernels)
        self._add_depths(stages, depths)
        if not self.decisions:
            raise UserError(
                f"{type(model).__name__} leaves no choice of architecture: widths {_text(widths)}, kernels "
                f"{_text(kernels)} and depths {_text(depths)} offer one choice each for what it has"
            )
        self._check_smallest(example)

    # ------------------------------------------------------ choices

    @property
    def largest(self) -> list[int]:
        """The choice with the most of everything."""
        return [len(decision.choices) - 1 for decision in self.decisions]

    def size_of(self, name: str, choice: Sequence[int]) -> Size | None:
        """Return the size of a layer under a choice, one index per decision; None if its block is left out.

        Args:
            name: Name of an elastic layer.
            choice: One index per decision.
        """
        parts, whole = self.parts[name], self.whole[name]

        def value(index: int | None, otherwise: int) -> int:
            return otherwise if index is None else self.decisions[index].choices[choice[index]]

        if parts.depth is not None and value(parts.depth, 0) <= parts.place:
            return None
        return Size(value(parts.out, whole.out), value(parts.read, whole.read), value(parts.kernel, whole.kernel))

    def weights_of(self, name: str, size: Size) -> int:
        """Return the number of weights of an elastic layer of some size, without its bias."""
        lost = self.whole[name].kernel - size.kernel
        _, read, *sides = self.stored[name]
        read = 1 if read < self.whole[name].read else size.read  # of a depthwise convolution
        return size.out * read * math.prod(side - lost for side in sides)

    def set(self, choice: Sequence[int]) -> None:
        """Switch the model to a choice, one index per decision."""
        for name in self.parts:
            layer = self.model.get_submodule(name)
            if isinstance(layer, Elastic) and (size := self.size_of(name, choice)) is not None:
                layer.resize(size)
        for name, (decision, place) in self.blocks.items():
            block: Any = self.model.get_submodule(name)
            block.skipped = self.decisions[decision].choices[choice[decision]] <= place

    def left_out(self, choice: Sequence[int]) -> list[str]:
        """Return the names of the blocks that a choice leaves out."""
        chosen = [decision.choices[index] for decision, index in zip(self.decisions, choice, strict=True)]
        return [name for name, (decision, place) in self.blocks.items() if chosen[decision] <= place]

    def describe(self, choice: Sequence[int]) -> dict[str, str]:
        """Return decision -> its choice as text: part of a record."""
        pairs = zip(self.decisions, choice, strict=True)
        return {f"{decision.name} {decision.kind}": decision.describe(index) for decision, index in pairs}

    def extract(self, choice: Sequence[int]) -> nn.Module:
        """Turn the model, in place, into the plain smaller one of a choice.

        Weights become copies of the slices in use; nothing elastic is left. The layers stay the same objects.

        Args:
            choice: One index per decision.

        Returns:
            The model.
        """
        self.set(choice)
        described = self._describe_sizes(choice)
        for name in self.blocks:
            _replace(self.model, name, freeze_block(self.model.get_submodule(name)))
        for layer in list(self.model.modules()):
            if isinstance(layer, Elastic):
                freeze(layer)
        setattr(self.model, NOTE, described)
        return self.model

    def _describe_sizes(self, choice: Sequence[int]) -> dict[str, Any]:
        """Return what `quant.elastic.saved.shrink` reads."""
        sizes = {name: self.size_of(name, choice) for name in self.parts}
        blocks = {name: self.model.get_submodule(name) for name in self.left_out(choice)}
        return {
            "sizes": {name: [size.out, size.read, size.kernel] for name, size in sizes.items() if size is not None},
            "skipped": {name: bool(block.in_tuple) for name, block in blocks.items()},
        }

    # ------------------------------------------------------ construction

    def _decide(self, name: str, kind: Kind, choices: Sequence[int], whole: int, unit: int = 1) -> int:
        self.decisions.append(StructureDecision(name, kind, tuple(choices), whole, unit))
        return len(self.decisions) - 1

    def _make_elastic(self, name: str) -> Elastic:
        layer = self.model.get_submodule(name)
        if not isinstance(layer, Elastic):
            elastic = make_elastic(layer)
            _replace(self.model, name, elastic)
            layer = elastic
            self.parts[name], self.whole[name] = LayerParts(), elastic.whole
            weight = layer._parameters.get("weight")
            self.stored[name] = () if weight is None else tuple(weight.shape)
        return layer

    def _depend(self, name: str, **on: int) -> None:
        self._make_elastic(name)
        self.parts[name] = LayerParts(**{**vars(self.parts[name]), **on})

    def _add_widths(self, channels: Sequence[Channels], widths: Sequence[float]) -> None:
        for group in channels:
            units = group.size // group.unit
            choices = sorted({group.unit * max(1, round(units * share)) for share in widths})
            if len(choices) == 1 and choices[0] == group.size:
                continue
            kind: Kind = "width" if group.unit == 1 else "heads"
            index = self._decide(group.writers[0], kind, choices, group.size, group.unit)
            for name in (*group.writers, *group.followers):
                self._depend(name, out=index)
            for name in (*group.readers, *group.followers):
                self._depend(name, read=index)

    def _add_kernels(self, kernels: Sequence[int]) -> None:
        found = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.Conv2d)}
        square = {
            name: layer
            for name, layer in found.items()
            if layer.kernel_size[0] > 1 and layer.groups in (1, layer.in_channels)
        }
        deep = {
            name: layer
            for name, layer in square.items()
            if layer.groups > 1 or not any(c.groups > 1 for c in square.values())
        }
        largest = max((layer.kernel_size[0] for layer in deep.values()), default=0)
        if kernels and max(kernels) > largest:
            raise UserError(
                f"kernel {max(kernels)} is larger than the largest of {type(self.model).__name__}, {largest}"
            )
        for name, layer in deep.items() if kernels else ():
            if not (can_be_elastic(layer) or isinstance(layer, Elastic)):
                continue
            least = cast(ElasticConv2d, self._make_elastic(name)).smallest_kernel
            own = layer.kernel_size[0]
            choices = sorted({side for side in kernels if least <= side <= own and (own - side) % 2 == 0})
            if len(choices) > 1 or choices not in ([], [own]):
                self._depend(name, kernel=self._decide(name, "kernel", choices, own))

    def _add_depths(self, stages: Sequence[Stage], depths: Sequence[int]) -> None:
        most = max((len(stage.blocks) for stage in stages), default=0)
        if depths and max(depths) > most:
            raise UserError(
                f"depth {max(depths)} is more than the blocks of any stage of {type(self.model).__name__}, {most}"
            )
        for stage in stages:
            fewer = {depth for depth in depths if max(stage.least, 1) <= depth < len(stage.blocks)}
            if not fewer:
                continue
            choices = sorted(fewer | {len(stage.blocks)})
            index = self._decide(stage.name, "depth", choices, len(stage.blocks))
            for place, block in enumerate(stage.blocks):
                for name, layer in list(self.model.get_submodule(block).named_modules(prefix=block)):
                    if can_be_elastic(layer) or isinstance(layer, Elastic):
                        self._depend(name, depth=index, place=place)
                if place >= stage.least:
                    make_skippable(self.model.get_submodule(block), stage.in_tuple)
                    self.blocks[block] = index, place

    @torch.no_grad()
    def _check_smallest(self, example: Any) -> None:
        """Run the smallest choice once: code that counts on a size, such as a view with numbers, shows here."""
        self.set([0] * len(self.decisions))
        try:
            with evaluating(self.model):
                run_model(self.model, example)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{type(self.model).__name__} does not run at its smallest size: {' '.join(str(error).split())}"
            ) from None
        finally:
            self.set(self.largest)


def check_choices(widths: Sequence[float], kernels: Sequence[int], depths: Sequence[int]) -> None:
    """Raise UserError for choices that no model has."""
    if not widths or wrong_share(widths) is not None:
        raise UserError(f"widths are shares of the trained one in (0, 1], got {_text(widths)}")
    if any(side < 1 or side % 2 == 0 for side in kernels):
        raise UserError(f"kernels have odd sides, as 3, 5 and 7, got {_text(kernels)}")
    if any(depth < 1 for depth in depths):
        raise UserError(f"depths are numbers of blocks, at least 1, got {_text(depths)}")


def wrong_share(widths: Sequence[float]) -> float | None:
    """Return the first width that is no share in (0, 1]."""
    return next((share for share in widths if not 0 < share <= 1), None)


def freeze(layer: Elastic) -> None:
    """Turn an elastic layer, quantized or not, into a plain one of its chosen size, in place."""
    plain: Any = plain_class(getattr(type(layer), "own", type(layer)))  # `own`: what a quantized class was made from
    if isinstance(layer, QuantModule):
        narrow(layer.weight_quantizer, layer.size.out, tuple(layer.weight.shape))
        plain = quantized_class(plain)
    freeze_size(layer, plain)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values) or "none"
