"""The monitor: what a call records, how it comes to the host, and where it goes."""

from __future__ import annotations

import atexit
import itertools
import math
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import clip as _clip
from .. import gradients
from ..clip import as_list
from ..functional import _order
from ..gradients import ZERO, Clip, Gradients
from .alarms import Alarms
from .hidden import Hidden, watch
from .writers import Writer, warn_of, writers_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Call(NamedTuple):
    """What is known of a call when it returns; its numbers are still where the gradients are."""

    step: int
    names: tuple[str, ...]  # of the rows
    max_norm: float | None  # None where nothing was clipped by norm
    nonfinite: int
    numbers: list[Tensor]  # norm, factor of the gradients, loss, the table, and what watch_hidden saw
    loss: float | None
    hidden: list[tuple[str, int]]  # names, and how many numbers each has

    @property
    def size(self) -> int:
        return sum(number.numel() for number in self.numbers)


class Row(NamedTuple):
    """A record as it is kept: numbers of the call, and of each of its parameters."""

    step: int
    norm: float
    clipped: float | None  # the norm after the clip; None where it is not known
    coef: float | None
    nonfinite: int
    loss: float | None
    names: tuple[str, ...]
    # (N,), float32: of each parameter.
    norms: Tensor
    largest: Tensor
    zeros: Tensor
    first_nonfinite: str | None
    others_nonfinite: int  # parameters beside the first
    max_norm: float | None
    hidden: dict[str, list[float]]


class GradMonitor:
    """Records what gradients are at every step, while they are clipped: in the same read, and without a wait.

    A record has ``grad_norm`` (before the clip), ``grad_norm_clipped`` (after), ``grad_clip_coef``, ``grad_nonfinite``
    (elements), ``loss`` if it was given, and for each parameter ``grad_norm/{name}``, ``grad_max/{name}`` and
    ``grad_zeros/{name}``. After a clip by value the norm is not known without another read: the two in the middle are
    left out. Numbers stay on the device and come over in one copy for every ``every`` calls, and at :meth:`flush`,
    :meth:`close` and exit; 32 bytes for each parameter and call until then.

    Alarms are warnings of class ``fastclip.GradientWarning``, one for each cause until it is over: gradients that are
    not finite, a jump of the norm or of the loss, exponential growth, layers whose gradients vanish, and a bound that
    clips at nearly every step or never.

    Args:
        model: a Module, or an iterable of (name, parameter).
        every (int): calls after which the numbers come over.
        writer (optional): a path (``.jsonl`` or ``.csv``, which is appended to), an object with
            ``add_scalar(tag, value, step)``, a callable ``(dict, step)``, or a list of those. One that raises is warned
            of and left out; training goes on.
        layers (str, re.Pattern or callable, optional): a regex that is searched in the names, or a predicate: whose
            parameters have entries of their own. Default: all.
        prefix (str): of all tags.
        alarms (bool): whether to warn.
        ranks (str): "first", or "all": which ranks write and warn. Numbers of sharded gradients are those of all ranks
            either way.
        keep (int, optional): how many of the latest records are kept for ``records`` and :meth:`summary`; None for all,
            at 12 bytes for each parameter and step.

    Raises:
        TypeError, ValueError: an argument is not of its kind.

    Example:
        >>> import torch, fastclip
        >>> model = torch.nn.Linear(2, 1)
        >>> monitor = fastclip.GradMonitor(model)
        >>> loss = model(torch.tensor([[3.0, 4.0]])).sum()
        >>> loss.backward()
        >>> monitor.clip_grad_norm_(1.0, loss=loss)
        tensor(5.0990)
        >>> record = monitor.records[0]
        >>> record["train/grad_norm"], record["train/grad_norm/weight"], record["train/grad_zeros/bias"]
        (5.0990195135927845, 5.0, 0)
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        every: int = 1,
        writer: Any = None,
        layers: str | re.Pattern[str] | Callable[[str], bool] | None = None,
        prefix: str = "train/",
        alarms: bool = True,
        ranks: str = "first",
        keep: int | None = None,
    ) -> None:
        named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
        for each in named:
            if not (isinstance(each, tuple) and len(each) == 2 and isinstance(each[1], Tensor)):
                raise TypeError(f"model: expected a Module or pairs of a name and a parameter, got {each!r}")
        for argument, value, least in (("every", every, 1), ("keep", keep, 1)):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{argument}: expected an integer of at least {least}, got {value!r}")
        if ranks not in ("first", "all"):
            raise ValueError(f"ranks: expected 'first' or 'all', got {ranks!r}")
        if isinstance(layers, (str, re.Pattern)):
            pattern = re.compile(layers)
            layers = lambda name: pattern.search(name) is not None  # noqa: E731
        elif layers is not None and not callable(layers):
            raise TypeError(f"layers: expected a regex or a predicate on names, got {layers!r}")
        self.prefix, self.every, self.ranks = prefix, every, ranks
        self.parameters = [parameter for _, parameter in named]
        self.step = 0  # of the next call
        self._names = {id(parameter): str(name) for name, parameter in reversed(named)}
        self._shown = layers
        self._writers: list[Writer] = writers_of(writer)
        self._alarms = Alarms() if alarms else None
        self._rows: deque[Row] = deque(maxlen=keep)
        self._waiting: list[_Call] = []
        self._arriving: deque[tuple[list[_Call], Tensor, torch.cuda.Event | None]] = deque()
        self._known: tuple[tuple[int, ...], tuple[str, ...]] = (), ()
        self._hidden: list[Hidden] = []
        # What is left comes over at exit, of monitors that are still there.
        reference = weakref.ref(self)
        self._at_exit: Callable[[], None] = lambda: close_of(reference)
        atexit.register(self._at_exit)

    # Clipping.

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        *,
        loss: float | Tensor | None = None,
        parameters: Tensor | Iterable[Tensor] | None = None,
        norm_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | Iterable[ProcessGroup] | None = None,
        is_duplicate: Callable[[Tensor], bool] | None = None,
        nonfinite: str = "propagate",
        found_inf: Tensor | None = None,
        inv_scale: float | Tensor | None = None,
    ) -> Tensor:
        """:func:`fastclip.clip_grad_norm_`, to the same bits, and a record of it.

        Args:
            max_norm, norm_type, error_if_nonfinite, foreach, norm_dtype, process_group, is_duplicate, nonfinite,
            found_inf, inv_scale: as there. An order other than 2 takes a read more. Numbers are recorded times
                ``inv_scale``.
            loss (float or Tensor, optional): of this step; a Tensor is not waited for.
            parameters (optional): whose gradients are clipped; default: those of the model.

        Returns:
            Tensor: 0-dim norm before clipping.
        """
        parameters = self.parameters if parameters is None else as_list(parameters)
        norm_type = _clip._to_float(norm_type, "norm_type")
        _clip._check_norm_dtype(norm_dtype)
        options = _clip._options(nonfinite, found_inf, inv_scale, error_if_nonfinite)
        look = _Look(self, parameters, loss)
        return _clip.clip_in_steps(
            parameters, max_norm, norm_type, options, error_if_nonfinite or nonfinite == "raise", foreach,
            process_group, is_duplicate, norm_dtype, look
        )  # fmt: skip

    def clip_grad_value_(
        self,
        clip_value: float,
        foreach: bool | None = None,
        *,
        loss: float | Tensor | None = None,
        parameters: Tensor | Iterable[Tensor] | None = None,
        nonfinite: str = "propagate",
        found_inf: Tensor | None = None,
        inv_scale: float | Tensor | None = None,
    ) -> None:
        """:func:`fastclip.clip_grad_value_`, and a record of the gradients before it, for one read.

        Args:
            clip_value, foreach, nonfinite, found_inf, inv_scale: as there.
            loss, parameters (optional): as of :meth:`clip_grad_norm_`.
        """
        parameters = self.parameters if parameters is None else as_list(parameters, warn=False)
        look = _Look(self, parameters, loss)
        options = _clip._options(nonfinite, None, inv_scale, among=("propagate", "zero"))
        look.read(gradients.of(parameters, foreach, writes=False), options)
        _clip.clip_grad_value_(
            parameters, clip_value, foreach, nonfinite=nonfinite, found_inf=found_inf, inv_scale=inv_scale
        )
        look.record(None)

    def clip_grads_with_norm_(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        total_norm: Tensor,
        foreach: bool | None = None,
        *,
        loss: float | Tensor | None = None,
    ) -> None:
        """:func:`fastclip.clip_grads_with_norm_`, and a record with that norm, for one read.

        Args:
            parameters, max_norm, total_norm, foreach: as there.
            loss (float or Tensor, optional): of this step.
        """
        parameters = as_list(parameters, warn=False)
        look = _Look(self, parameters, loss)
        look.read(gradients.of(parameters, foreach, writes=False), ())
        _clip.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
        norm = _clip.distributed.full(total_norm) if isinstance(total_norm, Tensor) else None
        if norm is not None and norm.dim() == 0 and not norm.is_complex():
            look.norm = norm.detach()
        look.record(Clip(float(max_norm), 2.0))

    def observe(self, loss: float | Tensor | None = None) -> Tensor:
        """Records the gradients as they are, and clips nothing.

        Args:
            loss (float or Tensor, optional): of this step.

        Returns:
            Tensor: 0-dim norm.
        """
        read = gradients.of(self.parameters, writes=False)
        look = _Look(self, self.parameters, loss)
        look.read(read, ())
        look.record(Clip(math.inf, 2.0))
        return read.finish(read.total_norm(2.0) if look.norm is None else look.norm, None)

    def covers(self, parameters: Sequence[Tensor]) -> bool:
        """Whether one of some parameters is the model's."""
        return any(id(parameter) in self._names for parameter in parameters)

    def watch_hidden(self, module: nn.Module, name: str | None = None) -> Hidden:
        """Records, with each call, the norm of the loss gradient along a module: over time, or over depth.

        Of a recurrent module (``nn.RNN``, ``nn.LSTM``, ``nn.GRU``) it is the gradient that reaches the input of each
        time step, through all later ones; of a cell that is called once for each step, that of each output; of any
        other module that of the output of each child, in the order of their calls.

        Args:
            module: the module, of the model or not.
            name (str, optional): in the records, ``grad_hidden/{name}``; default: the name of its class.

        Returns:
            Hidden: a handle with ``remove()``.
        """
        hidden = watch(module, name or type(module).__name__)
        self._hidden.append(hidden)
        return hidden

    # What was recorded.

    @property
    def rows(self) -> Sequence[Row]:
        """The records, as they are kept."""
        self.flush()
        return self._rows

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records, oldest first, as dicts of tag and number, with ``step``."""
        self.flush()
        return [{"step": row.step, **self._tags(row)} for row in self._rows]

    def summary(self) -> dict[str, Any]:
        """What the records say together.

        Returns:
            dict: ``steps``, ``nonfinite_steps``, ``grad_clip_fraction`` (of the steps that a bound was given to),
            ``grad_norm_p50``, ``p90`` and ``p99`` of the finite norms before clipping, and ``layers``: the median norm
            of each parameter, by name.
        """
        self.flush()
        finite = sorted(row.norm for row in self._rows if math.isfinite(row.norm))
        bounded = [row for row in self._rows if row.coef is not None and row.max_norm != math.inf]
        clipped = sum(row.coef < 1 for row in bounded if row.coef is not None)
        layers: dict[str, list[float]] = {}
        for row in self._rows:
            for name, norm in zip(row.names, row.norms.tolist(), strict=True):  # on the host
                if math.isfinite(norm):
                    layers.setdefault(name, []).append(norm)
        quantiles = {f"grad_norm_p{p}": _percentile(finite, p) for p in (50, 90, 99)}
        return {
            "steps": len(self._rows),
            "nonfinite_steps": sum(row.nonfinite > 0 or not math.isfinite(row.norm) for row in self._rows),
            "grad_clip_fraction": clipped / len(bounded) if bounded else math.nan,
            **quantiles,
            "layers": {name: median(norms) for name, norms in layers.items() if self._shows(name)},
        }

    def state_dict(self) -> dict[str, Any]:
        """What the monitor goes on from: its step and what the alarms remember; records are in the writers."""
        self.flush()
        return {"step": self.step, "alarms": self._alarms.state_dict() if self._alarms else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the state of another monitor."""
        if not {"step", "alarms"} <= state.keys():
            raise ValueError(f"state: expected what state_dict() of a GradMonitor gave, got {list(state)}")
        self.step = int(state["step"])
        if self._alarms and state["alarms"]:
            self._alarms.load_state_dict(state["alarms"])

    def flush(self) -> None:
        """Waits for what was recorded, writes it, and warns of what it shows."""
        self._send()
        self._receive(wait=True)

    def close(self) -> None:
        """Flushes, closes the writers that a path was given for, and takes hooks off."""
        atexit.unregister(self._at_exit)
        self.flush()
        for hidden in self._hidden:
            hidden.remove()
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> GradMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # From the device to the records.

    def _names_of(self, parameters: Sequence[Tensor]) -> tuple[str, ...]:
        """The name of each parameter; "" for one that is not the model's."""
        if parameters is self.parameters:
            key: tuple[int, ...] = ()
        else:
            key = tuple(map(id, parameters))
        if not self._known[1] or self._known[0] != key:
            self._known = key, tuple(self._names.get(id(parameter), "") for parameter in parameters)
        return self._known[1]

    def _add(self, call: _Call) -> None:
        self._waiting.append(call)
        self.step += 1
        if len(self._waiting) >= self.every:
            self._send()
        self._receive(wait=False)

    def _send(self) -> None:
        """Starts one copy of all that waits."""
        if not self._waiting:
            return
        calls, self._waiting = self._waiting, []
        numbers = [number.detach().reshape(-1) for call in calls for number in call.numbers]
        home = numbers[0].device
        flat = torch.cat(
            [number.to(home, torch.float64 if home.type != "mps" else torch.float32) for number in numbers]
        )
        event = None
        if home.type == "cuda":
            here = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            here.copy_(flat, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(home))
        else:
            here = flat.cpu()  # it is there, or on a device whose copies cannot be waited for later
        self._arriving.append((calls, here, event))

    def _receive(self, wait: bool) -> None:
        while self._arriving:
            calls, here, event = self._arriving[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._arriving.popleft()
            place = 0
            for (names, size), like in itertools.groupby(calls, lambda call: (call.names, call.size)):
                same = list(like)
                for row in _rows(names, same, here[place : place + size * len(same)].reshape(len(same), size)):
                    self._keep(row)
                place += size * len(same)

    def _keep(self, row: Row) -> None:
        self._rows.append(row)
        if self.ranks == "first" and _rank() != 0:
            return
        if self._writers:
            tags = self._tags(row)
            for writer in list(self._writers):
                try:
                    writer.write(tags, row.step)
                except Exception as error:  # whatever a writer raises must not end a run
                    self._writers.remove(writer)
                    warn_of(writer, error)
        if self._alarms:
            self._alarms.look(row)

    def _shows(self, name: str) -> bool:
        return bool(name) and (self._shown is None or bool(self._shown(name)))

    def _tags(self, row: Row) -> dict[str, Any]:
        tags: dict[str, Any] = {"grad_norm": row.norm}
        if row.clipped is not None:
            tags |= {"grad_norm_clipped": row.clipped, "grad_clip_coef": row.coef}
        tags["grad_nonfinite"] = row.nonfinite
        if row.max_norm is not None and row.max_norm != math.inf:
            tags["grad_max_norm"] = row.max_norm
        if row.loss is not None:
            tags["loss"] = row.loss
        each = (row.norms.tolist(), row.largest.tolist(), row.zeros.tolist())  # on the host
        for name, norm, largest, zeros in zip(row.names, *each, strict=True):
            if self._shows(name):
                tags |= {f"grad_norm/{name}": norm, f"grad_max/{name}": largest, f"grad_zeros/{name}": int(zeros)}
        tags |= {f"grad_hidden/{name}": norms for name, norms in row.hidden.items()}
        return {self.prefix + tag: value for tag, value in tags.items()}


class _Look:
    """What is seen in one call."""

    def __init__(self, monitor: GradMonitor, parameters: Sequence[Tensor], loss: float | Tensor | None) -> None:
        self.monitor, self.parameters, self.loss = monitor, parameters, loss
        self.table: Tensor | None = None
        self.norm: Tensor | None = None
        self.inv_scale: float | Tensor | None = None
        self.names: tuple[str, ...] = ()
        self.nonfinite = 0

    def read(self, read: Gradients, options: tuple) -> None:
        if not isinstance(read, gradients.Nothing):
            self.see(read, 2.0, options)

    def see(self, read: Gradients, norm_type: float, options: tuple) -> Tensor | None:
        """Reads the gradients; returns their norm if it is of the order asked for."""
        self.nonfinite, self.inv_scale = (options[0], options[2]) if options else (0, None)
        self.table, norm = read.stats_and_norm()
        names = self.monitor._names_of(self.parameters)
        if len(read.tensors) != len(names) or type(read) is not gradients.Plain:
            held = [(name, p.grad) for name, p in zip(names, self.parameters, strict=True) if p.grad is not None]
            order = _order(read, [grad for _, grad in held])
            names = tuple(name for name, _ in held)
            if order is not None:
                rows = [""] * len(read.tensors)
                for name, row in zip(names, order, strict=True):
                    rows[row] = name
                names = tuple(rows)
        self.names, self.norm = names, norm
        return norm if norm_type == 2 else None

    def record(self, clip: Clip | None, norm: Tensor | None = None) -> None:
        """After the clip: by a norm, or by value where there is none."""
        norm = self.norm if norm is None else norm
        if self.table is None or norm is None:
            return  # there were no gradients
        home, loss, inv_scale = self.table.device, self.loss, self.inv_scale
        scale = inv_scale if isinstance(inv_scale, Tensor) else 1.0 if inv_scale is None else inv_scale
        as_numbers = [
            number if isinstance(number, Tensor) else self.table.new_full((), number) for number in (norm, scale)
        ]
        if isinstance(loss, Tensor):
            as_numbers.append(loss.detach() if loss.numel() == 1 else loss.detach().float().mean())
        hidden, seen = [], []
        for each in self.monitor._hidden:
            norms = each.take()
            if norms is not None:
                hidden.append((each.name, norms.numel()))
                seen.append(norms.to(home))
        self.monitor._add(
            _Call(
                self.monitor.step,
                self.names,
                None if clip is None else clip.max_norm,
                self.nonfinite,
                [self.table, *as_numbers, *seen],
                None if isinstance(loss, Tensor) or loss is None else float(loss),
                hidden,
            )
        )


def _rows(names: tuple[str, ...], calls: Sequence[_Call], numbers: Tensor) -> Iterator[Row]:
    """Records of calls that are alike from their numbers, (calls, numbers of each), which are on the host."""
    count = len(names)
    tables = numbers[:, : 4 * count].reshape(len(calls), count, 4)
    rest = numbers[:, 4 * count :].tolist()  # on the host, as all that follows
    factors = numbers[:, 4 * count + 1].abs().unsqueeze(1)
    norms, largest = ((each * factors).float() for each in (tables[..., 0].sqrt(), tables[..., 1]))
    zeros, nonfinite = tables[..., 3].float(), tables[..., 2].sum(1).tolist()  # likewise
    for i, (call, (norm, scale, *others)) in enumerate(zip(calls, rest, strict=True)):
        first = len(others) - sum(size for _, size in call.hidden)
        hidden, place = {}, first
        for name, size in call.hidden:
            hidden[name] = others[place : place + size]
            place += size
        coef = clipped = None
        if call.max_norm is None:
            norm *= abs(scale)
        else:
            coef = clip_coef(norm, call.max_norm)
            clipped = norm * coef
            if call.nonfinite == ZERO and not math.isfinite(norm):
                coef = clipped = 0.0
        # Likewise.
        bad = tables[i, :, 2].nonzero().flatten().tolist() if nonfinite[i] else []
        yield Row(
            call.step,
            norm,
            clipped,
            coef,
            int(nonfinite[i]),
            others[0] if first else call.loss,
            names,
            norms[i],
            largest[i],
            zeros[i],
            names[bad[0]] or "a parameter of another model" if bad else None,
            max(len(bad) - 1, 0),
            call.max_norm,
            hidden,
        )


def clip_coef(norm: float, max_norm: float) -> float:
    """As in arithmetic.py, on the host."""
    if max_norm == math.inf:
        return 1.0
    coef = max_norm / (norm + 1e-6) if norm != -1e-6 else math.inf
    return min(coef, 1.0) if coef == coef else coef


def _percentile(values: list[float], p: float) -> float:
    """With linear interpolation, of values in order; NaN of none."""
    if not values:
        return math.nan
    at = (len(values) - 1) * p / 100
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)


def close_of(reference: weakref.ref[GradMonitor]) -> None:
    monitor = reference()
    if monitor is not None:
        monitor.close()
