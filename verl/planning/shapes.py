"""A policy without numbers, whose forward and backward pass count memory and traffic.

Rows, losses and metrics are real, so that the update's own code runs as it is. The model is made of torch's fake
tensors, which have a shape, a dtype and a life, and no memory.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import once_differentiable
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from verl.models.fsdp import decoder_layers
from verl.models.policy import PolicyModel, PolicyOutput

Parts = dict[str, int]
"""Bytes by what they are used for, see `PARTS`."""

# What torch's trackers call a kind of memory, in the words of this project. A policy's forward has no inputs that they
# would count, so that kind stands for the logits.
PARTS = {
    _FSDPRefType.SHARDED_PARAM: "shards",
    _FSDPRefType.UNSHARDED_PARAM: "gathered layers",
    _FSDPRefType.ALL_GATHER: "gathered layers",
    _FSDPRefType.SHARDED_GRAD: "gradient shards",
    _FSDPRefType.UNSHARDED_GRAD: "gradients",
    _FSDPRefType.REDUCE_SCATTER: "gradients",
    _FSDPRefType.OPT: "optimizer",
    _FSDPRefType.BUFFER: "activations",
    _FSDPRefType.ACT: "activations",
    _FSDPRefType.TEMP: "activations",
    _FSDPRefType.INP: "logits",
    _MemRefType.PARAM: "shards",
    _MemRefType.GRAD: "gradient shards",
    _MemRefType.OPT: "optimizer",
    _MemRefType.BUFFER: "activations",
    _MemRefType.ACT: "activations",
    _MemRefType.TEMP: "activations",
    _MemRefType.OTH: "logits",
}

# Bytes that a rank sends in a ring, by the tensor whose size counts: the whole of a gathered or scattered one, and
# twice the whole of a reduced one, each times (ranks - 1) / ranks.
_COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: ("all-gather", 0, 1),
    torch.ops.c10d._reduce_scatter_base_.default: ("reduce-scatter", 1, 1),
    torch.ops.c10d.allreduce_.default: ("all-reduce", 0, 2),
}
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default


class PlannedPolicy(PolicyModel):
    """A policy of fake weights. What a forward returns is real (zeros), and a backward through it reaches the weights.

    Args:
        on_gpu: rows are packed as on a GPU.
    """

    def __init__(self, lm: Any, fake: FakeTensorMode, on_gpu: bool) -> None:
        super().__init__(lm)
        self.fake, self.on_gpu = fake, on_gpu
        self.tracker: Any = None
        # Before they are sharded, which changes the names of their classes.
        self.layers = decoder_layers(self)

    @property
    def shares_prompts(self) -> bool:
        return not self.on_gpu

    def to(self, *args: Any, **kwargs: Any) -> "PlannedPolicy":
        """Does nothing: fake tensors are on no device."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> PolicyOutput:
        # Its statistics by module are of one forward.
        self.tracker.reset_mod_stats()
        with self.fake:
            out = super().__call__(*args, **kwargs)
        found = {name: value for name, value in vars(out).items() if value is not None}
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        real = _Outside.apply(anchor, self.fake, list(found.values()))
        return PolicyOutput(**{**dict.fromkeys(vars(out)), **dict(zip(found, real, strict=True))})


class _Outside(torch.autograd.Function):
    """Real zeros in place of fake outputs. Their gradients go on, as fake ones, through the fake graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, fake: FakeTensorMode, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.fake, ctx.outputs = fake, outputs
        return tuple(torch.zeros(output.shape) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        # An output that the loss does not use has no part in the fake graph either where it is None there.
        used = [(output, grad) for output, grad in zip(ctx.outputs, grads, strict=True) if output.requires_grad]
        with ctx.fake:
            torch.autograd.backward([output for output, _ in used], [ctx.fake.from_tensor(grad) for _, grad in used])
        ctx.outputs = None
        return None, None, None


class _Counted:
    """What is added to torch's trackers: a peak for each section of a pass, logits by name, and traffic.

    A section is a pass through one decoder layer or what lies between them: forward or backward, in which forward since
    the section's begin, at which of first, middle and last layer, and which parts are there: moments with and without
    logits take turns at being the peak. Within a section memory grows linearly with the number of layers, so that the
    peaks of two models of few layers tell those of a model of many.
    """

    def __init__(self, policy: PlannedPolicy, logits: Any, *args: Any) -> None:
        super().__init__(*args)
        self._fake, self._vocabulary, self._logits = policy.fake, policy.lm.config.get_text_config().vocab_size, logits
        layers = policy.layers
        places = ["first", *["middle"] * (len(layers) - 2), "last"][: len(layers)]
        names = {id(module): name for name, module in policy.named_modules()}
        self._places = {
            f"{type(policy).__name__}.{names[id(layer)]}": place for layer, place in zip(layers, places, strict=True)
        }
        self.begin()

    def begin(self) -> None:
        """Forget the peaks and the traffic so far."""
        self.peaks: dict[str, Parts] = {}
        self.wire: dict[str, float] = defaultdict(float)
        self._forwards = 0

    def reset_mod_stats(self) -> None:
        self._forwards += 1
        super().reset_mod_stats()  # type: ignore[misc]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
            # Rows and positions. Some of their operations have results whose size depends on the numbers.
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # the gradient's norm: any finite number does
        if func is _WAIT:
            return args[0]
        # The model runs inside the fake mode and the optimizer outside; what DTensor tries in a mode of its own is
        # skipped.
        mode = active_fake_mode()
        self._fake_mode_on_entry = self._fake if mode is self._fake else None
        found = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[misc]
        if found is not NotImplemented:
            self._count_traffic(func, args, found)
            self._note_peak()
        return found

    def _track(self, kind: Any, tensor: Tensor) -> None:
        is_logits = tensor.dim() == 2 and tensor.shape[1] == self._vocabulary
        super()._track(self._logits if is_logits else kind, tensor)  # type: ignore[misc]

    def _count_traffic(self, func: Any, args: Sequence[Any], found: Any) -> None:
        if func is _GATHER:
            name, tensor, times, ranks = "all-gather", found, 1, args[1]
        elif func in _COLLECTIVES:
            name, place, times = _COLLECTIVES[func]
            tensor = args[place][0] if isinstance(args[place], list | tuple) else args[place]
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            ranks = torch.distributed.ProcessGroup.unbox(group).size()
        else:
            return
        self.wire[f"{self._forwards} {name}"] += times * tensor.nbytes * (ranks - 1) / ranks

    def _note_peak(self) -> None:
        for kinds in self._curr_mem_snap.values():  # type: ignore[attr-defined]
            parts: Parts = defaultdict(int)
            for kind, size in kinds.items():
                if size and kind in PARTS:
                    parts[PARTS[kind]] += size
            section = f"{self._section()}: {', '.join(sorted(parts))}"
            if kinds["Total"] > sum(self.peaks.get(section, {}).values()):
                self.peaks[section] = dict(parts)

    def _section(self) -> str:
        tracked = self._mod_tracker  # type: ignore[attr-defined]
        inside = [place for name, place in self._places.items() if name in tracked.parents]
        direction = "optimizer" if self._in_opt else "backward" if tracked.is_bw else "forward"  # type: ignore[attr-defined]
        return f"{self._forwards} {direction} {inside[0] if inside else 'outside'}"


class _ShardedCounted(_Counted, FSDPMemTracker):
    pass


class _PlainCounted(_Counted, MemTracker):
    pass


def count(policy: PlannedPolicy, optimizer: Optimizer) -> Any:
    """A tracker of a policy, sharded or not, and of its optimizer; use it as a context."""
    tracker: Any
    if isinstance(policy, FSDPModule):
        tracker = _ShardedCounted(policy, _FSDPRefType.INP, policy, optimizer)
    else:
        tracker = _PlainCounted(policy, _MemRefType.OTH)
        tracker.track_external(policy, optimizer)
    policy.tracker = tracker
    return tracker
