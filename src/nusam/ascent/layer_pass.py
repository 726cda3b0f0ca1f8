"""Ascent without weight gradients: Algorithm 2's products from each layer's input and output gradient.

A whole sequential iteration, v from u and then u from the new v, fits inside the layer's backward (see
:mod:`nusam.layers.kinds` for the products), and the gradient is never formed. A use of a matrix is either *served*:
the matrix is no input of the layer's function then, so that nobody's hook sees a gradient that is not there; or
*checked*: the gradient is formed as ever, and the products beside it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from nusam.ascent.asked import standing_in
from nusam.ascent.findings import Job, Watching
from nusam.ascent.function import without_autocast
from nusam.ascent.record import Record
from nusam.ascent.silence import Silence
from nusam.interrupts import always, entered, remove_hook
from nusam.layers.idle import IdleLayers
from nusam.layers.kinds import Handler
from nusam.layers.reads import watched
from nusam.layers.uses import Use, rerouted
from nusam.power_iteration import Matrix, TopPair, meeting, normalized, top_pairs

__all__ = ["LayerPass"]


class LayerPass:
    """One ascent pass in which the given uses of matrices hand out top pairs, instead of gradients or beside them.

    Args:
        uses: where the model uses the matrices.
        jobs: what to do for every matrix.
        iterations: T of Algorithm 2.
        compiles: whether the model may be compiled; if it is though this is False, its gradients are formed.
        idle: layers whose gradients nobody needs.
        needed: parameters whose gradients somebody does.
        watches: whether those of idle layers are formed, to see who asks for them.
        silent: what takes part in no backward, where matrices are served apart from their parameters.
        tells: whether others' uses of these can be seen.
    """

    def __init__(
        self,
        uses: list[Use],
        jobs: dict[Tensor, Job],
        iterations: int,
        compiles: bool,
        idle: IdleLayers,
        needed: set[Tensor],
        watches: bool,
        silent: Sequence[Tensor] = (),
        tells: bool = True,
    ) -> None:
        self._uses = uses
        self._idle = idle
        self._needed = needed
        self._watches = watches
        self._silence, self._tells = Silence(silent), tells
        self._looks = ExitStack()
        self._is_the_loop = False  # whose code runs
        self._others = Watching()  # at gradients of idle layers, and of biases
        self._stand_ins: dict[Tensor, Tensor] = {}
        self.tap = torch.zeros((), requires_grad=True, device="cpu")  # reached where autograd accumulates
        self._tap_node = torch.autograd.graph.get_gradient_edge(self.tap).node
        self._iterations = iterations
        self.records: dict[Tensor, Record] = {}
        self.known: dict[Tensor, TopPair] = {}  # of matrices that others have served in this pass
        self.backwards = 0  # that accumulated
        self._compiles = compiles
        self.add(jobs)

    def add(self, jobs: dict[Tensor, Job]) -> None:
        """Take the products of these too."""
        us = meeting([job.state["u"] for job in jobs.values()])
        for (parameter, job), u in zip(jobs.items(), us, strict=True):
            own = Record(parameter, job, u, self._iterations, self._stand_ins, self.tap, self._tap_node)
            self.records[parameter] = own
            if self._compiles:
                own.make_probe()

    def accumulates(self) -> bool:
        """Whether the running backward accumulates; if not, it returns gradients that the loss itself asks for."""
        return bool(torch._C._will_engine_execute_node(self._tap_node))

    def need(self, parameters: set[Tensor]) -> None:
        """Form the gradients of these, for another optimizer whose pass runs too.

        Raises:
            RuntimeError: if one is a matrix of this pass.
        """
        both = next((parameter for parameter in parameters if parameter in self.records), None)
        if both is not None:
            raise RuntimeError(
                f"A matrix of shape {tuple(both.shape)} is perturbed by one optimizer and held by another whose passes "
                "run at once; run them one after the other, or use ascent='gradient'."
            )
        self._needed |= parameters
        self._idle.need(parameters)
        for use in self._uses:
            record = self.records.get(use.parameter)
            if record is not None and not parameters.isdisjoint(use.module._parameters.values()):
                record.others_need_bias = True

    @property
    def is_compiled(self) -> bool:
        """Whether compiled graphs have left anything."""
        return any(record.probed is not None for record in self.records.values())

    @property
    def keeps(self) -> bool:
        """Whether products are multiplied after the pass, as processes that share it must."""
        return any(record.job.keeps for record in self.records.values())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the pass inside; the model is as found afterwards."""
        handlers: dict[Tensor, Handler] = {p: record.use for p, record in self.records.items()}
        checked = [record for record in self.records.values() if record.job.checks]
        # served layers compute with detached weights: a frozen one gets a gradient where it is used elsewhere
        thawed = [(p, p.grad) for p, record in self.records.items() if record.thaws]

        def undo() -> None:
            for parameter, gradient in thawed:
                parameter.requires_grad_(False)
                parameter.grad = gradient
            for record in checked:
                remove_hook(record.leaf, record.complete)

        apart = {p: record for p, record in self.records.items() if record.job.apart}
        around = self._idle.watched() if self._watches and not apart else self._idle.detached(self._needed)
        asked = standing_in(self._stand_ins, self._idle, self._see_looks, self._silence if apart else None)
        with always(undo), rerouted(self._uses, handlers), around, asked:
            for parameter, _ in thawed:
                parameter.grad = None
                parameter.requires_grad_(True)
            for record in checked:
                if record.leaf.is_leaf and not record.elsewhere:
                    record.leaf.register_post_accumulate_grad_hook(record.complete)  # type: ignore[no-untyped-call]
            yield

    @contextmanager
    def in_the_loop(self) -> Iterator[None]:
        """Inside is the loop's code: no parameter takes part in a backward where matrices are served apart from it."""
        apart = {p: record for p, record in self.records.items() if record.job.apart}

        def undo() -> None:
            self._is_the_loop = False
            self._looks.close()

        with always(undo), self._silence.kept(apart, self._tells) if apart else nullcontext():
            self._is_the_loop = True
            yield

    def _see_looks(self) -> None:
        """A backward is over: from here on, see who looks at gradients, which matrices that are served don't have."""
        self.backwards += 1
        if not self._is_the_loop:
            return
        own = {p: record.looks for p, record in self.records.items() if record.would_have_a_gradient}
        idle = self._idle.parameters() if self._watches and own else ()
        besides = (p for p in idle if p.requires_grad and p not in self.records and p not in self._needed)
        others = dict.fromkeys(besides, self._others)
        self._looks.enter_context(watched({**own, **others}))

    def note_looks(self) -> list[Tensor]:
        """Matrices whose gradients are there, and the loop has looked at them.

        All of them where it was at a gradient that no perturbation needs, of which none is hidden any more then.
        """
        if self._others.seen:
            self._idle.show()
        there = [record for record in self.records.values() if not record.leaves_none]
        return [r.parameter for r in there if r.looks.seen or (self._others.seen and not r.frozen)]

    def settle(self) -> None:
        """The backwards are over: multiply what waits, and put the gradients that stand-ins have into parameters."""
        waiting = [record for record in self.records.values() if record.waiting is not None]
        if waiting:
            with entered(torch.no_grad(), without_autocast(waiting[0].u.device)):
                gradients: list[Matrix] = [record.waiting for record in waiting if record.waiting is not None]
                us = [record.u for record in waiting]
                warm_starts = [record.job.state["u"].to(record.u.device) for record in waiting]
                found = top_pairs(gradients, us, warm_starts, waiting[0].iterations)
                for record, top in zip(waiting, found, strict=True):
                    record.top, record.pair, record.waiting = top, (top.u, top.v), None
        for record in self.records.values():
            record.settle()

    def saw_gradients(self) -> bool:
        """Whether any backward has passed through one of the layers."""
        return any(record.reached or record.gradient is not None for record in self.records.values())

    def unreached(self) -> Iterator[Tensor]:
        """Frozen matrices that no backward of this process has reached, where no other process may have."""
        for parameter, record in self.records.items():
            reached = record.reached or record.gradient is not None or record.is_overwritten
            if record.was_frozen and not (record.job.shares or reached):
                yield parameter

    def check_backwards(self) -> None:
        """Refuse a pass without a backward, where gradients are found by backwards alone."""
        if any(record.job.apart for record in self.records.values()):
            self._silence.check()

    def top_pairs(self, parameters: Iterable[Tensor]) -> dict[Tensor, TopPair]:
        """The pairs that the layers found for these, each used once."""
        found: dict[Tensor, TopPair] = {}
        records = {}
        for parameter in parameters:
            record = self.records[parameter]
            top = record.top
            if top is not None and record.probed is None:
                device = record.job.state["u"].device
                found[parameter] = top if top.u.device == device else TopPair(*(x.to(device) for x in top))
            else:
                records[parameter] = record
        if records:
            us, vs = zip(*(record.vectors() for record in records.values()), strict=True)
            warm_starts = [record.job.state["u"] for record in records.values()]
            found |= zip(records, normalized(list(us), list(vs), warm_starts), strict=True)
        return found

    def forget(self) -> None:
        """Begin anew: what the layers have left so far does not count."""
        for record in self.records.values():
            record.forget()

    def release(self) -> None:
        """Let go of what was kept, which a loss that lives on would keep alive."""
        for record in self.records.values():
            record.kept, record.formed, record.waiting, record.leaves = [], None, None, []
