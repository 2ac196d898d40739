"""Whole segments of memory as context, one after the other, as one node of autograd.

A segment waits for the memory that the one before it left, and what it does is small: under autograd a hundred nodes
for each, whose gradients of weights are added up segment by segment. Here the write is one call of the native core
(``native.write``), the gradients of the rest are written out, and those of weights are one product for all segments.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from meristem.native import write
from meristem.shapes import Hidden, Keys

BySegment = Float[Tensor, "n b c d"]
ByHead = Float[Tensor, "n b h c k"]


class Inputs(NamedTuple):
    """What is differentiated; n segments of c tokens.

    asked_nbhck: what the memory is read with, for each of its heads. query_nbhck, keys_nbhck, values_nbhcv: of
    attention, queries scaled, they and keys at their positions. pinned_nbhcg, pinned_ghv: scores of the persistent
    vectors and their values. context_fd: makes keys and values of what is recalled; qkv_fd and gates_fd, bias_f: what
    the memory is written with, of what attention gathered. All after it: as in ``native.write.Inputs``.
    """

    asked_nbhck: Tensor
    query_nbhck: Tensor
    keys_nbhck: Tensor
    values_nbhcv: Tensor
    pinned_nbhcg: Tensor | None
    pinned_ghv: Tensor | None
    context_fd: Tensor
    qkv_fd: Tensor
    gates_fd: Tensor
    bias_f: Tensor
    weight_dc: Tensor
    most_h: Tensor | None
    memory_bhkv: Tensor
    moving_bhkv: Tensor | None
    tail_bsd: Tensor


class Found(NamedTuple):
    """What tokens gather and what the memory recalls of that, ``n b c d``; memory, momentum and tail after them."""

    attended_nbcd: Tensor
    recalled_nbcd: Tensor
    memory_bhkv: Tensor
    moving_bhkv: Tensor | None
    tail_bsd: Tensor


def read_segments(inputs: Inputs, rule: write.Rule, turns: tuple[Tensor, Tensor] | None) -> Found:
    """Read and write whole segments, under autograd.

    turns: cosines and sines of the positions in a segment, ``(c, k)``, the latter with their sign, as ``apply_rope``
    has them; None without rotation. A segment is no shorter than the tail.
    """
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return Found(*Segments.apply(keeps, rule, turns, *inputs))


class Segments(torch.autograd.Function):
    """``apply(keeps, rule, turns, *inputs) -> found``."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        keeps, rule, turns, *inputs = given
        run = Run(Inputs(*inputs), rule, turns, keeps=keeps)
        for n in range(run.n_segments):
            run.forward(n)
        ctx.set_materialize_grads(False)
        moving = None if run.moving_nbhkv is None else run.moving_nbhkv[-1].clone()
        found = run.attended_nbcd, run.read_nbcd, run.memory_nbhkv[-1].clone(), moving, run.tail_nbsd[-1].clone()
        if keeps:
            # Inputs as well, so that torch notices where one was changed in between.
            ctx.save_for_backward(*inputs, run.attended_nbcd)
            ctx.run = run
        # Results that their own node holds would never be freed.
        del run.attended_nbcd, run.read_nbcd
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_found: Tensor | None) -> tuple[Tensor | None, ...]:
        back = Backward(ctx.run, ctx.saved_tensors[-1], d_found)
        for n in reversed(range(ctx.run.n_segments)):
            back.segment(n)
        return None, None, None, *back.inputs()


class Run:
    """The segments of one call: what each makes, in one tensor for all, and from what."""

    def __init__(self, inputs: Inputs, rule: write.Rule, turns: tuple[Tensor, Tensor] | None, *, keeps: bool) -> None:
        self.given, self.rule, self.turns = inputs, rule, turns
        self.asked_nbhck, self.query_nbhck = inputs.asked_nbhck.contiguous(), inputs.query_nbhck.contiguous()
        n, b, h, c, k = inputs.query_nbhck.shape
        self.n_segments, self.batch, self.length, self.width = n, b, c, h * k
        self.n_pinned = g = 0 if inputs.pinned_ghv is None else len(inputs.pinned_ghv)
        new = self.query_nbhck.new_empty
        self.keys_nbhsk, self.values_nbhsv = new(n, b, h, 2 * c, k), new(n, b, h, g + 2 * c, k)
        self.keys_nbhsk[..., c:, :] = inputs.keys_nbhck
        self.values_nbhsv[..., g + c :, :] = inputs.values_nbhcv
        if inputs.pinned_ghv is not None:
            self.values_nbhsv[..., :g, :] = inputs.pinned_ghv.transpose(0, 1)
        later_cc = new(c, c).fill_(-math.inf).triu_(1)
        self.later_cs = torch.cat([later_cc, later_cc], dim=1)
        self.weights_nbhcs = new(n, b, h, c, g + 2 * c)
        self.context_nbcd, self.attended_nbcd, self.read_nbcd = (new(n, b, c, h * k) for _ in range(3))
        self.mixed_nbcd, self.logits_nbcf = new(n, b, c, len(inputs.qkv_fd)), new(n, b, c, len(inputs.gates_fd))
        self.memory_nbhkv = _first(inputs.memory_bhkv, n)
        self.moving_nbhkv = None if inputs.moving_bhkv is None else _first(inputs.moving_bhkv, n)
        self.tail_nbsd = _first(inputs.tail_bsd, n)
        self.weight_dc = inputs.weight_dc.contiguous()
        shapes = self.write_inputs(0).sizes.saved(rule) if keeps else ()
        self.saved = tuple(new(n, *shape) for shape in shapes)

    def write_inputs(self, n: int) -> write.Inputs:
        """What is written after segment ``n``, and what it is written into."""
        moving = None if self.moving_nbhkv is None else self.moving_nbhkv[n]
        given = self.mixed_nbcd[n], self.tail_nbsd[n], self.weight_dc, self.logits_nbcf[n], self.given.most_h
        return write.Inputs(*given, self.memory_nbhkv[n], moving)

    def saved_of(self, n: int) -> tuple[Tensor, ...]:
        return tuple(each[n] for each in self.saved)

    def rows(self, x_nbcd: BySegment, n: int) -> Tensor:
        """The tokens of segment ``n`` of all texts."""
        return x_nbcd[n].view(self.batch * self.length, -1)

    def by_head(self, x_nbcd: BySegment, n: int, width: int) -> Tensor:
        """The same for each head, as a view that can be written."""
        return x_nbcd[n].view(self.batch, self.length, -1, width).transpose(1, 2)

    def flat(self, x_nbhck: ByHead, n: int) -> Tensor:
        """A matrix for each head of each text."""
        return x_nbhck[n].flatten(0, 1)

    def forward(self, n: int) -> None:
        given, c, g = self.given, self.length, self.n_pinned
        memory_width, width = self.memory_nbhkv.shape[-1], self.keys_nbhsk.shape[-1]
        self.by_head(self.context_nbcd, n, memory_width).copy_(self.asked_nbhck[n] @ self.memory_nbhkv[n])
        both = torch.mm(self.rows(self.context_nbcd, n), given.context_fd.mT)
        key_bhck, value_bhcv = both.view(self.batch, c, 2, -1, width).permute(2, 0, 3, 1, 4)
        _rotate(key_bhck, self.turns, self.keys_nbhsk[n, :, :, :c], way=1)
        self.values_nbhsv[n, :, :, g : g + c] = value_bhcv
        score = torch.baddbmm(self.later_cs, self.flat(self.query_nbhck, n), self.flat(self.keys_nbhsk, n).mT)
        if given.pinned_nbhcg is not None:
            score = torch.cat([self.flat(given.pinned_nbhcg, n), score], dim=-1)
        weights = torch.softmax(score, dim=-1, out=self.flat(self.weights_nbhcs, n))
        mixed = torch.bmm(weights, self.flat(self.values_nbhsv, n))
        self.by_head(self.attended_nbcd, n, width).copy_(mixed.view(self.batch, -1, c, width))
        attended = self.rows(self.attended_nbcd, n)
        torch.mm(attended, given.qkv_fd.mT, out=self.rows(self.mixed_nbcd, n))
        torch.addmm(given.bias_f, attended, given.gates_fd.mT, out=self.rows(self.logits_nbcf, n))
        moving = None if self.moving_nbhkv is None else self.moving_nbhkv[n + 1]
        places = self.read_nbcd[n], self.memory_nbhkv[n + 1], moving, self.saved_of(n) or None
        write.write_forward(self.write_inputs(n), self.rule, write.Places(*places))
        self.tail_nbsd[n + 1] = self.mixed_nbcd[n, :, c - self.tail_nbsd.shape[2] :]


class Backward:
    """The gradients of a run, from the last segment to the first."""

    def __init__(self, run: Run, attended_nbcd: BySegment, d_found: tuple[Tensor | None, ...]) -> None:
        self.run, self.attended_nbcd = run, attended_nbcd
        d_attended, d_read, d_memory, d_moving, d_tail = d_found
        # These are added to.
        self.d_attended_nbcd = _own(d_attended, attended_nbcd)
        self.d_memory = _own(d_memory, run.memory_nbhkv[0])
        self.d_read_nbcd = torch.zeros_like(attended_nbcd) if d_read is None else d_read.contiguous()
        self.d_moving = None if run.moving_nbhkv is None else _own(d_moving, run.moving_nbhkv[0])
        self.d_tail = d_tail
        like = torch.empty_like
        self.d_mixed_nbcd, self.d_logits_nbcf = like(run.mixed_nbcd), like(run.logits_nbcf)
        self.d_asked_nbhck, self.d_query_nbhck = like(run.asked_nbhck), like(run.query_nbhck)
        self.d_keys_nbhsk, self.d_values_nbhsv = like(run.keys_nbhsk), like(run.values_nbhsv)
        self.d_pinned_nbhcg: list[Tensor] = []
        n, b, c, d = attended_nbcd.shape
        self.d_both_nbcd = attended_nbcd.new_empty(n, b, c, 2 * d)
        self.d_weight_nbdc = run.weight_dc.new_empty(n, b, *run.weight_dc.shape)
        self.d_most_nbh = run.weight_dc.new_empty(n, *run.memory_nbhkv.shape[1:3])

    def segment(self, n: int) -> None:
        self._through_write(n)
        run = self.run
        attended = run.rows(self.d_attended_nbcd, n)
        attended.addmm_(run.rows(self.d_mixed_nbcd, n), run.given.qkv_fd)
        attended.addmm_(run.rows(self.d_logits_nbcf, n), run.given.gates_fd)
        self._through_attention(n)
        recalled = torch.mm(run.rows(self.d_both_nbcd, n), run.given.context_fd)
        memory_bhkv, asked_bhck = run.memory_nbhkv[n], run.asked_nbhck[n]
        d_recalled_bhcv = recalled.view(run.batch, run.length, *memory_bhkv.shape[1::2]).transpose(1, 2)
        torch.matmul(d_recalled_bhcv, memory_bhkv.mT, out=self.d_asked_nbhck[n])
        self.d_memory += asked_bhck.mT @ d_recalled_bhcv

    def _through_write(self, n: int) -> None:
        run, d_moving = self.run, self.d_moving
        made = write.Inputs(
            self.d_mixed_nbcd[n],
            torch.empty_like(run.tail_nbsd[n]),
            self.d_weight_nbdc[n],
            self.d_logits_nbcf[n],
            self.d_most_nbh[n],
            torch.empty_like(self.d_memory),
            None if d_moving is None else torch.empty_like(d_moving),
        )
        gradients = write.Gradients(self.d_read_nbcd[n], self.d_memory, d_moving, run.saved_of(n), made)
        write.write_backward(run.write_inputs(n), run.rule, gradients)
        if self.d_tail is not None:
            self.d_mixed_nbcd[n, :, run.length - run.tail_nbsd.shape[2] :] += self.d_tail
        self.d_tail, self.d_memory, self.d_moving = made.tail_bsd, made.memory_bhkv, made.moving_bhkv

    def _through_attention(self, n: int) -> None:
        run, c, g = self.run, self.run.length, self.run.n_pinned
        width = run.keys_nbhsk.shape[-1]
        sent = run.by_head(self.d_attended_nbcd, n, width).flatten(0, 1)
        weights = run.flat(run.weights_nbhcs, n)
        d_weights = torch.bmm(sent, run.flat(run.values_nbhsv, n).mT)
        d_score = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        torch.bmm(weights.mT, sent, out=run.flat(self.d_values_nbhsv, n))
        if g:
            self.d_pinned_nbhcg.append(d_score[..., :g])
            d_score = d_score[..., g:]
        torch.bmm(d_score, run.flat(run.keys_nbhsk, n), out=run.flat(self.d_query_nbhck, n))
        torch.bmm(d_score.mT, run.flat(run.query_nbhck, n), out=run.flat(self.d_keys_nbhsk, n))
        d_both = self.d_both_nbcd[n].view(run.batch, c, 2, -1, width).permute(2, 0, 3, 1, 4)
        _rotate(self.d_keys_nbhsk[n, :, :, :c], run.turns, d_both[0], way=-1)
        d_both[1].copy_(self.d_values_nbhsv[n, :, :, g : g + c])

    def inputs(self) -> Inputs:
        """Of the inputs, once all segments are done."""
        run, c, g = self.run, self.run.length, self.run.n_pinned
        given = run.given
        d_pinned = None
        if self.d_pinned_nbhcg and given.pinned_nbhcg is not None:
            d_pinned = torch.stack(self.d_pinned_nbhcg[::-1]).view_as(given.pinned_nbhcg)
        attended = self.attended_nbcd.view(-1, run.width)
        d_logits = self.d_logits_nbcf.flatten(0, 2)
        return Inputs(
            self.d_asked_nbhck,
            self.d_query_nbhck,
            self.d_keys_nbhsk[..., c:, :],
            self.d_values_nbhsv[..., g + c :, :],
            d_pinned,
            self.d_values_nbhsv[..., :g, :].sum(dim=(0, 1)).transpose(0, 1) if g else None,
            torch.mm(self.d_both_nbcd.flatten(0, 2).mT, run.context_nbcd.view(-1, run.width)),
            torch.mm(self.d_mixed_nbcd.flatten(0, 2).mT, attended),
            torch.mm(d_logits.mT, attended),
            d_logits.sum(dim=0),
            self.d_weight_nbdc.sum(dim=(0, 1)),
            None if given.most_h is None else self.d_most_nbh.sum(dim=(0, 1)),
            self.d_memory,
            self.d_moving,
            self.d_tail if self.d_tail is not None else torch.zeros_like(given.tail_bsd),
        )


def _first(x: Tensor, n_segments: int) -> Tensor:
    """Room for what each segment finds and the last one leaves, the first filled in."""
    all_of_them = x.new_empty(n_segments + 1, *x.shape)
    all_of_them[0] = x
    return all_of_them


def _own(d: Tensor | None, like: Tensor) -> Tensor:
    """A gradient that may be written to."""
    return torch.zeros_like(like) if d is None else d.clone(memory_format=torch.contiguous_format)


def _rotate(x_bhck: Tensor, turns: tuple[Tensor, Tensor] | None, to_bhck: Tensor, *, way: int) -> None:
    """``apply_rope`` into a place that is there; with ``way`` -1 back again."""
    if turns is None:
        to_bhck.copy_(x_bhck)
        return
    cos_ck, sin_ck = turns
    half = cos_ck.shape[-1] // 2
    torch.mul(x_bhck, cos_ck, out=to_bhck)
    to_bhck[..., :half].addcmul_(x_bhck[..., half:], sin_ck[:, :half], value=way)
    to_bhck[..., half:].addcmul_(x_bhck[..., :half], sin_ck[:, half:], value=way)


def by_segment(x_bthk: Keys, length: int) -> ByHead:
    """``b (n c) h k`` as ``n b h c k``."""
    return x_bthk.unflatten(1, (-1, length)).permute(1, 0, 3, 2, 4)


def by_token(x_nbcd: BySegment) -> Hidden:
    """``n b c d`` as ``b (n c) d``."""
    return x_nbcd.transpose(0, 1).flatten(1, 2)
