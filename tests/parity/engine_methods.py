"""Methods, batches and the plain-torch reference that the engines are held against."""

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from distrl.contract import (
    MEAN_UNITS,
    Batch,
    Catalog,
    CorruptionRates,
    Losses,
    Method,
    Packed,
    Phase,
    Term,
)
from distrl.data.config import DataConfig
from distrl.data.found import Found
from distrl.data.neighbor_batch import neighbors_of
from distrl.data.samples import BatchMaker
from distrl.methods import build, parse_method
from distrl.ops.losses import next_item_loss
from distrl.ops.packing import pack
from distrl.ops.ragged import Ragged
from distrl.ops.sequences import mixed, seed_key
from tests.packed import batch_of

NUM_ITEMS, MAX_LEN = 12, 6
POISON = 11
"""An item whose loss Tiny makes infinite, and POISON + 1 one whose gradient it makes NaN."""
SIZES = {"hidden_size": 8, "inner_size": 16, "num_heads": 2}
STILL = {"dropout": 0.0, "attention_dropout": 0.0, **SIZES}
TEXT_SIZE = 3
MOST_INSERTED = 2
CPU = torch.device("cpu")


class Tiny(Method):
    """The traits that trip engines: a tied table, an autograd Function, two parts, dropout.

    Its losses are means over targets or pairs and nothing else, so that one worker with all rows
    and several with some of them have the same gradient.
    """

    num_views = 2

    def __init__(self, dropout=0.0):
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"table": nn.Embedding(NUM_ITEMS + 1, 8), "mix": nn.Linear(8, 8)}
        )
        self.head = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scale", torch.full((8,), 0.5))

    @property
    def parts(self):
        return {"encoder": self.encoder, "head": self.head}

    def phases(self, epoch):
        return (
            Phase("encoder", ("encoder",)),
            Phase("head", ("head",)),
            Phase("both", ("encoder", "head")),
        )

    def _states(self, packed):
        embedded = self.encoder["table"](packed.items).flatten(0, 1)
        states = torch.tanh(self.dropout(self.encoder["mix"](embedded)))
        return states * self.scale.to(states.dtype)

    def forward(self, batch, phase):
        pairs = [self.item_vectors.new_zeros((0, 8))] * 2
        with torch.set_grad_enabled("encoder" in phase.trains):
            if batch.num_pairs:
                pairs = [self._states(view)[view.last] for view in batch.views]
        h1, h2 = pairs
        learned = (self.head(h1) - h2).square().sum() / max(len(h1), 1)
        terms = {"learned": Term(0.5, learned, "pair")}
        if "encoder" in phase.trains:
            states = self._states(batch.clean)[batch.target_at]
            value = next_item_loss(states, self.encoder["table"].weight, batch.targets)
            if (batch.targets == POISON).any():
                value = value * float("inf")
            if (batch.targets == POISON + 1).any():
                value = value + (value - value).abs().sqrt()
            terms["next_item"] = Term(1.0, value, "target")
        return Losses(terms)

    def user_states(self, histories):
        return self._states(histories)[histories.last]

    @property
    def item_vectors(self):
        return self.encoder["table"].weight


def make(name, **settings):
    """The same fresh method at every call and on every rank."""
    torch.manual_seed(3)
    if name == "tiny":
        return Tiny(**settings)
    recurrent = {"dropout": 0.0, "hidden_size": 8, "inner_size": 16}
    still = recurrent if settings.get("base") == "gru4rec" else STILL
    if name == "sracl":
        base = {"name": settings.pop("base"), **still, **settings.pop("of_base", {})}
        given = {"base": base, "text_size": TEXT_SIZE, "synthesizer_dropout": 0.0, **settings}
    else:
        given = {**STILL, **settings}
    config = parse_method({"name": name, **given})
    method = build(config, Catalog(NUM_ITEMS, MAX_LEN))
    for parameter in method.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)  # at the initial 0.02 hardly anything moves
    return method


def rows(step):
    """Seven sequences with targets and two views each, for one step of all workers."""
    rng = torch.Generator().manual_seed(100 + step)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=rng).tolist()

    lengths = draw(1, MAX_LEN + 1, 7)
    sequences = [draw(1, POISON, n) for n in lengths]
    views = tuple([draw(0, POISON, n) for n in lengths] for _ in range(2))
    return sequences, draw(1, POISON, 7), views


def cut(step, start, end):
    sequences, targets, (first, second) = rows(step)
    views = (first[start:end], second[start:end])
    batch = batch_of(sequences[start:end], targets[start:end], views, MAX_LEN)
    numbers = torch.arange(start, end) // 3  # three prefixes a sample, over the border of ranks too
    batch = replace(batch, pair_sample=numbers, pair_target=batch.targets, pair_at=batch.target_at)
    damaged = damage(step, sequences[start:end], targets[start:end], start)
    return replace(batch, damaged=damaged, **like(step, sequences[start:end], start))


def damage(step, sequences, targets, start):
    """Prefixes with their targets, corrupted: the same for each wherever it is."""
    rates = CorruptionRates(0.4, 0.45, 0.15, MOST_INSERTED)
    config = DataConfig(store_uri="unused", max_len=MAX_LEN)
    maker = BatchMaker(config, 1, NUM_ITEMS, seed=0, corruption=rates)
    numbers = np.arange(start, start + len(sequences))
    keys = mixed(np.repeat(seed_key(step), len(sequences)), numbers)
    return maker._damaged(Ragged.of(sequences), np.array(targets, dtype=np.int64), keys)


def like(step, sequences, start):
    """Neighbors and semantic views of some prefixes, the same for each wherever it is."""
    found = [neighborhood(step, start + number) for number in range(len(sequences))]
    flat = [entry for _, entries in found for entry in entries]
    neighbors = neighbors_of(
        Found(
            halves([text for text, _ in found]),
            np.array([len(entries) for _, entries in found], dtype=np.int64),
            np.array([window for window, _, _ in flat], dtype=np.int64),
            np.array([window for window, _, _ in flat], dtype=np.int64),
            np.array([len(items) for _, items, _ in flat], dtype=np.int64),
            Ragged.of([items for _, items, _ in flat]),
            halves([text for _, _, text in flat]),
        ),
        Ragged.of(sequences),
        most=2,
        row_length=MAX_LEN,
    )
    turned = ([[1 + (i + by) % (POISON - 1) for i in row] for row in sequences] for by in (1, 4))
    first, second = (pack(Ragged.of(rows), MAX_LEN)[0] for rows in turned)
    return {"neighbors": neighbors, "semantic_views": (first, second)}


def halves(rows):
    return np.array(rows, dtype=np.float16).reshape(-1, TEXT_SIZE)


def neighborhood(step, number):
    """Text of a prefix, and (window, items, text) of its neighbors; the third prefix has none."""
    rng = np.random.default_rng(1000 * step + number)
    entries = [
        (
            2 * number + k,
            rng.integers(1, POISON, rng.integers(1, MAX_LEN + 1)).tolist(),
            rng.random(3),
        )
        for k in range(0 if number == 2 else 2)
    ]
    return rng.random(3), entries


def empty():
    none = torch.zeros(0, dtype=torch.int64)
    blank = torch.zeros((1, MAX_LEN), dtype=torch.int64)
    packed = Packed(blank, torch.full_like(blank, -1), blank, none)
    batch = Batch(packed, none, none, (packed, packed), none, none, none)
    return replace(batch, damaged=damage(0, [], [], 0), **like(0, [], 0))


def batches_of(step, world):
    """One step's batches of all ranks: the same rows whatever the world, unequally spread."""
    return [cut(step, 0, 7)] if world == 1 else [cut(step, 0, 2), cut(step, 2, 7)]


def lopsided(step, world):
    """Batches in which the last rank has a single pair at step 1, and nothing at step 2."""
    if world == 1:
        return [[cut(step, 0, 7), cut(step, 2, 3), cut(step, 0, 7)][step]]
    return [cut(step, 0, 4), [cut(step, 4, 7), cut(step, 4, 5), empty()][step]]


def with_prefixes(method, batches):
    """The batches, for a method that takes one random view with prefixes as the second ones."""
    if method.num_views != 1:
        return batches
    return [replace(batch, views=(batch.views[0], batch.clean)) for batch in batches]


def phases_of(method):
    """Those of an epoch, behind those of a first one where it has others."""
    first, second = method.phases(0), method.phases(1)
    return first if second == first else (*first, *second)


def shares_of(batches):
    counts = {unit: [batch.count(unit) for batch in batches] for unit in MEAN_UNITS}
    return [
        {unit: n[r] * len(batches) / max(sum(n), 1) for unit, n in counts.items()}
        | {"sum": len(batches)}
        for r in range(len(batches))
    ]


class Reference:
    """Plain torch in one process: every rank's batch, the mean of the totals, then a step."""

    def __init__(self, method, config):
        self.method = copy.deepcopy(method)
        self.config = config
        self.master = {n: p.detach().clone() for n, p in self.method.named_parameters()}
        self.names = {id(p): n for n, p in self.method.named_parameters()}
        if config.precision == "bf16":
            for parameter in self.method.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self.optimizers = {part: self._optimizer(part) for part in self.method.parts}

    def _optimizer(self, part):
        names = [self.names[id(p)] for p in self.method.parts[part].parameters()]
        masters = [self.master[name] for name in names]
        lr = self.config.lr_of.get(part, self.config.lr)
        if self.config.optimizer == "adam":
            return torch.optim.Adam(masters, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        return torch.optim.SGD(masters, lr=lr, momentum=self.config.momentum)

    def step(self, batches, phase, seeds=None):
        shares, gradients = shares_of(batches), {}
        for name, part in self.method.parts.items():
            part.requires_grad_(name in phase.trains)
        for r, batch in enumerate(batches):
            if seeds is not None:
                torch.manual_seed(seeds[r])
            self.method.zero_grad()
            total = self.method(batch, phase).total(shares[r])
            if total.requires_grad:
                total.backward()
            for name, parameter in self.method.named_parameters():
                if parameter.requires_grad:
                    found = (
                        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    )
                    gradients[name] = gradients.get(name, 0.0) + found.float() / len(batches)
        for part in phase.trains:
            self._move(part, gradients)

    def _move(self, part, gradients):
        parameters = list(self.method.parts[part].parameters())
        masters = [self.master[self.names[id(p)]] for p in parameters]
        for parameter, master in zip(parameters, masters, strict=True):
            master.grad = gradients[self.names[id(parameter)]]
        if self.config.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(masters, self.config.max_grad_norm)
        self.optimizers[part].step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data.copy_(master)
