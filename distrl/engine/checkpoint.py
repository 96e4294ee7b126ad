"""Checkpoints that do not depend on ranks: any world size and any ZeRO stage reads them.

::

    model.safetensors             every weight of the method by name, float32, and its buffers
    optimizer-<part>.safetensors  <state>.<weight> for each state the optimizer keeps, and `step`

Nothing in them is a pickle. Each file is written under another name and renamed, so a file that
has its name is whole.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distrl.contract import Method
from distrl.engine.collectives import gather_objects, rank
from distrl.engine.shards import assemble, shape_of, write_weight
from distrl.engine.zero import Engines
from distrl.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
STEP = "step"


def optimizer_file(part: str) -> str:
    """Name of the file with one part's optimizer state."""
    return f"optimizer-{part}.safetensors"


def save(engines: Engines, folder: Path) -> None:
    """Writes weights and optimizers into a folder. Collective; rank 0 writes.

    Returns on every rank once the files are whole.

    Raises:
        CheckpointError: On every rank, if rank 0 cannot write.
    """
    weights = full_weights(engines)
    states = {part: full_optimizer_state(engines, part) for part in engines.parts}
    problem = None
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / WEIGHTS_FILE, weights, {"content": "weights"})
            for part, state in states.items():
                _write(folder / optimizer_file(part), state, _describe(engines))
        except (OSError, SafetensorError) as error:
            problem = f"cannot write the checkpoint into {folder}: {error}"
    _raise_together(problem)


def load(engines: Engines, folder: Path) -> None:
    """Takes weights and optimizers from a folder, whatever number of ranks wrote it. Collective.

    All files are checked before anything changes, and all ranks load or none does.

    Raises:
        CheckpointError: On every rank, naming the file and the tensor, if a file is missing or
            torn on any rank, or belongs to another method or optimizer.
    """
    try:
        weights = _read(folder / WEIGHTS_FILE, _shapes(engines.method), {"content": "weights"})
        states = {part: _read_optimizer(engines, folder, part) for part in engines.parts}
    except CheckpointError as error:
        problem, weights, states = str(error), {}, {}
    else:
        problem = None
    _raise_together(problem)
    _load_weights(engines, weights)
    for part, state in states.items():
        _load_optimizer(engines, part, state)


def load_weights(method: Method, folder: Path) -> None:
    """Takes the weights of a checkpoint into a plain method, without DeepSpeed or a process group.

    Raises:
        CheckpointError: Naming the file and the tensor, if it is missing, torn, or belongs to
            another method or catalog.
    """
    weights = _read(folder / WEIGHTS_FILE, _shapes(method), {"content": "weights"})
    with torch.no_grad():
        for name, tensor in method.state_dict(keep_vars=True).items():
            tensor.copy_(weights[name])


def _raise_together(problem: str | None) -> None:
    """One rank's problem is every rank's, so that none goes on alone. Collective."""
    problems = [found for found in gather_objects(problem) if found is not None]
    if problems:
        raise CheckpointError(problems[0])


def _describe(engines: Engines) -> dict[str, str]:
    """What an optimizer file says of itself."""
    return {"content": "optimizer", "optimizer": engines.config.optimizer}


def _shapes(method: Method) -> dict[str, torch.Size]:
    return {n: shape_of(tensor) for n, tensor in method.state_dict(keep_vars=True).items()}


def _names(engines: Engines) -> dict[int, str]:
    """Names of the trained parameters, by identity."""
    return {id(p): name for name, p in engines.method.named_parameters()}


def full_weights(engines: Engines) -> dict[str, Tensor]:
    """The method's state by name, whole, with float32 masters of what is trained. Collective.

    On the host of rank 0; empty on the others.
    """
    trained = {id(parameter) for parameter in engines.parameters()}
    weights: dict[str, Tensor] = {}
    for name, tensor in engines.method.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and id(tensor) in trained:
            shard = engines.shard(tensor)
            piece = None if shard is None else shard.piece(shard.master.detach())
            full = assemble(piece, shard, tensor)
        else:
            full = tensor.detach().cpu().clone() if rank() == 0 else None
        if full is not None:
            weights[name] = full
    return weights


def full_optimizer_state(engines: Engines, part: str) -> dict[str, Tensor]:
    """The optimizer's state of one part by name, whole; zeros before its first step. Collective.

    On the host of rank 0; on the others there is only `step`.
    """
    names, found = _names(engines), {}
    steps = torch.zeros((), dtype=torch.float32)
    for parameter in engines.parts[part]:
        shard = engines.shard(parameter)
        state = {} if shard is None else shard.state
        if STEP in state:
            steps = state[STEP].detach().float().cpu().reshape(())
        for key in engines.config.state_names:
            piece = shard.piece(state[key]) if shard is not None and key in state else None
            full = assemble(piece, shard, parameter)
            if full is not None:
                found[f"{key}.{names[id(parameter)]}"] = full
    found[STEP] = max(gather_objects(steps), key=float)
    return found


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)
    partial.replace(path)


def _read(
    path: Path, shapes: Mapping[str, torch.Size], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors of a file, which must be exactly these.

    Raises:
        CheckpointError: If they are not, or the file says something else of itself.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} is missing")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check(path, file, shapes, metadata)
            return {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint file {path} is torn: {error}") from error


def _check(
    path: Path,
    file: safe_open,
    shapes: Mapping[str, torch.Size],
    metadata: Mapping[str, str],
) -> None:
    described = file.metadata() or {}
    for key, expected in metadata.items():
        if described.get(key) != expected:
            raise CheckpointError(
                f"checkpoint file {path}: {key} is {described.get(key)!r}, expected {expected!r}"
            )
    held = set(file.keys())
    for name, shape in shapes.items():
        if name not in held:
            raise CheckpointError(f"checkpoint file {path} has no tensor {name}")
        found = tuple(file.get_slice(name).get_shape())
        if found != tuple(shape):
            raise CheckpointError(
                f"checkpoint file {path}: tensor {name} has shape {found}, expected {tuple(shape)}"
            )
    foreign = sorted(held - set(shapes))
    if foreign:
        raise CheckpointError(
            f"checkpoint file {path} holds {foreign[0]}, which the method does not have"
        )


def _read_optimizer(engines: Engines, folder: Path, part: str) -> dict[str, Tensor]:
    names = _names(engines)
    shapes = {
        f"{key}.{names[id(parameter)]}": shape_of(parameter)
        for parameter in engines.parts[part]
        for key in engines.config.state_names
    }
    shapes[STEP] = torch.Size()
    return _read(folder / optimizer_file(part), shapes, _describe(engines))


@torch.no_grad()
def _load_weights(engines: Engines, weights: Mapping[str, Tensor]) -> None:
    trained = {id(parameter) for parameter in engines.parameters()}
    for name, tensor in engines.method.state_dict(keep_vars=True).items():
        full = weights[name].to(tensor.device)
        if isinstance(tensor, nn.Parameter) and id(tensor) in trained:
            write_weight(tensor, engines.shard(tensor), full)
        else:
            tensor.copy_(full)


@torch.no_grad()
def _load_optimizer(engines: Engines, part: str, saved: Mapping[str, Tensor]) -> None:
    """Sets this rank's pieces; the state is made where the optimizer has not stepped yet."""
    names = _names(engines)
    for parameter in engines.parts[part]:
        shard = engines.shard(parameter)
        if shard is None:
            continue
        state = shard.state
        for key in engines.config.state_names:
            if key not in state:
                state[key] = torch.zeros_like(shard.master)
            full = saved[f"{key}.{names[id(parameter)]}"].to(shard.master.device)
            shard.piece(state[key]).copy_(shard.piece_of_parameter(full))
        if engines.config.optimizer == "adam":
            # Fused Adam counts its steps where the weights are.
            state[STEP] = saved[STEP].to(shard.master.device, copy=True)
