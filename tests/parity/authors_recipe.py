"""MCLRec as its authors train it, restated slowly from the specification of their code.

One prefix a row, padded on the right to the maximum length; RecBole's additive mask of -10000; one
projection each for query, key and value; a Python loop for the mask of correlated samples; two Adam
optimizers; three passes a batch. Nothing here is shared with distrl but the tensors handed in.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

MASKED = -10000.0


class AuthorsEncoder(nn.Module):
    """Post-norm SASRec over padded rows; returns the state of each row's last item."""

    def __init__(self, num_items, max_len, hidden=64, inner=256, layers=2, heads=2, dropout=0.5):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.item_embedding = nn.Embedding(num_items + 2, hidden)
        self.position_embedding = nn.Embedding(max_len, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.ModuleDict()
            for name in ("query", "key", "value", "dense"):
                layer[name] = nn.Linear(hidden, hidden)
            layer["attention_norm"] = nn.LayerNorm(hidden, eps=1e-12)
            layer["dense_1"] = nn.Linear(hidden, inner)
            layer["dense_2"] = nn.Linear(inner, hidden)
            layer["norm"] = nn.LayerNorm(hidden, eps=1e-12)
            self.layers.append(layer)

    def _drop(self, values):
        return F.dropout(values, self.dropout, self.training)

    def _split(self, values):
        rows, length, hidden = values.shape
        return values.view(rows, length, self.heads, hidden // self.heads).permute(0, 2, 1, 3)

    def forward(self, items, lengths):
        rows, length = items.shape
        states = self.item_embedding(items) + self.position_embedding.weight[:length]
        states = self._drop(self.norm(states))
        allowed = (items > 0)[:, None, None, :] & torch.ones(length, length).tril().bool()
        mask = torch.where(allowed, 0.0, MASKED)
        for layer in self.layers:
            query, key, value = (self._split(layer[n](states)) for n in ("query", "key", "value"))
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
            mixed = self._drop(scores.softmax(dim=-1)) @ value
            mixed = mixed.permute(0, 2, 1, 3).reshape(rows, length, -1)
            states = layer["attention_norm"](states + self._drop(layer["dense"](mixed)))
            inner = layer["dense_2"](F.gelu(layer["dense_1"](states)))
            states = layer["norm"](states + self._drop(inner))
        return states[torch.arange(rows), lengths - 1]


class AuthorsAugmenter(nn.Module):
    """64 -> 32 -> 16 -> 64 with exact GELUs, divided by its norm without an epsilon."""

    def __init__(self, sizes=(64, 32, 16, 64)):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(sizes[i], sizes[i + 1]) for i in range(len(sizes) - 1)
        )

    def forward(self, states):
        for layer in self.layers[:-1]:
            states = F.gelu(layer(states))
        views = self.layers[-1](states)
        return views / views.norm(dim=1, keepdim=True)


def mask_correlated_samples(batch_size):
    """True where a pair of the 2B views is a negative."""
    mask = torch.ones(2 * batch_size, 2 * batch_size, dtype=torch.bool).fill_diagonal_(False)
    for i in range(batch_size):
        mask[i, batch_size + i] = mask[batch_size + i, i] = False
    return mask


def scores_of(first, second):
    """Positives (2B) and negatives (2B, 2B - 2), dot product, temperature 1."""
    batch_size = len(first)
    views = torch.cat([first, second])
    similarity = views @ views.T
    positive = torch.cat([similarity.diagonal(batch_size), similarity.diagonal(-batch_size)])
    negative = similarity[mask_correlated_samples(batch_size)].view(2 * batch_size, -1)
    return positive, negative


def info_nce(first, second):
    positive, negative = scores_of(first, second)
    logits = torch.cat([positive[:, None], negative], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def regularizer(first, second):
    positive, negative = scores_of(first, second)
    hardest = negative.max(dim=1).values
    low, high = torch.minimum(positive, hardest), torch.maximum(positive, hardest)
    return F.relu(positive - low).mean() + F.relu(high[:, None] - negative).mean()


class AuthorsTrainer:
    """Encoder, augmenters, encoder again: three passes over the same batch."""

    def __init__(self, encoder, augmenters, *, data_weight, model_weight, lr=1e-3):
        self.encoder, self.augmenters = encoder, augmenters
        self.data_weight, self.model_weight = data_weight, model_weight
        self.of_encoder = torch.optim.Adam(encoder.parameters(), lr=lr)
        self.of_augmenters = torch.optim.Adam(augmenters.parameters(), lr=lr)

    def _terms(self, clean, targets, first, second):
        num_classes = self.encoder.item_embedding.num_embeddings - 1
        logits = self.encoder(*clean) @ self.encoder.item_embedding.weight[:num_classes].T
        h1, h2 = self.encoder(*first), self.encoder(*second)
        z1, z2 = self.augmenters[0](h1), self.augmenters[1](h2)
        pairs = ((h1, z2), (h2, z1), (z1, z2))
        return {
            "next_item": F.cross_entropy(logits, targets),
            "data_contrast": info_nce(h1, h2),
            "model_contrast": sum(info_nce(*pair) for pair in pairs),
            "margin": sum(regularizer(*pair) for pair in pairs),
        }

    def step(self, clean, targets, first, second):
        """The terms of each of the three passes, by phase."""
        said = {}
        for phase in ("encoder", "augmenters", "encoder_again"):
            terms = self._terms(clean, targets, first, second)
            model = terms["model_contrast"] + 0.1 * terms["margin"]
            if phase == "augmenters":
                loss, optimizer = model, self.of_augmenters
            else:
                loss = terms["next_item"] + self.model_weight * model
                loss = loss + self.data_weight * terms["data_contrast"]
                optimizer = self.of_encoder
            self.of_encoder.zero_grad()
            self.of_augmenters.zero_grad()
            loss.backward()
            optimizer.step()
            said[phase] = {name: value.item() for name, value in terms.items()}
        return said


def padded(packed, max_len):
    """The segments of a packed batch as their authors store them: items and lengths."""
    num_segments = len(packed.last)
    lengths = torch.zeros(num_segments, dtype=torch.int64)
    items = torch.zeros((num_segments, max_len), dtype=torch.int64)
    for slot, segment in enumerate(packed.segment.flatten().tolist()):
        if segment >= 0:
            items[segment, packed.position.flatten()[slot]] = packed.items.flatten()[slot]
            lengths[segment] += 1
    return items, lengths


def with_weights_of(method, num_items, max_len, *, dropout):
    """The authors' encoder and augmenters, holding the weights of a distrl MCLRec."""
    ours = method.encoder
    hidden = ours.item_table.embedding_dim
    theirs = AuthorsEncoder(num_items, max_len, hidden=hidden, dropout=dropout)
    pairs = [
        (theirs.item_embedding.weight, ours.item_table.weight),
        (theirs.position_embedding.weight, ours.positions.weight),
        *zip(theirs.norm.parameters(), ours.norm.parameters(), strict=True),
    ]
    names = {
        "dense": "output",
        "attention_norm": "attention_norm",
        "dense_1": "inner",
        "dense_2": "outer",
        "norm": "inner_norm",
    }
    for layer, own in zip(theirs.layers, ours.layers, strict=True):
        for name, part in names.items():
            parameters = getattr(own, part).parameters()
            pairs += zip(layer[name].parameters(), parameters, strict=True)
        for number, name in enumerate(("query", "key", "value")):
            block = slice(number * hidden, (number + 1) * hidden)
            pairs.append((layer[name].weight, own.query_key_value.weight[block]))
            pairs.append((layer[name].bias, own.query_key_value.bias[block]))
    augmenters = nn.ModuleList()
    for own in method.augmenters:
        sizes = [own.layers[0].in_features, *(layer.out_features for layer in own.layers)]
        augmenters.append(AuthorsAugmenter(sizes))
        pairs += zip(augmenters[-1].parameters(), own.parameters(), strict=True)
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)
    return theirs, augmenters
