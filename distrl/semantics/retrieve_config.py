"""What the retrieval of neighbors can be told."""

import math
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import NonNegativeFloat, PositiveInt, StringConstraints

from distrl.schema import Config

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]


class RetrieveConfig(Config):
    """Which items and windows of a store are neighbors, and how they are found."""

    store_uri: str
    """A folder that jobs/prepare.py wrote."""
    embeddings: Name
    """The table of vectors, `<store>/embeddings/<this>`."""
    name: Name | None = None
    """The table that is made, `<store>/neighbors/<this>`; None: called as its embeddings."""
    num_neighbors: PositiveInt = 10
    """Most neighbors of an item or a window."""
    exclude_same_user: bool = True
    """Whether windows of the same user are no neighbors, as in SRA-CL's paper; its code leaves out
    the identical window alone, and so finds prefixes that hold the very target."""
    held_out: bool = False
    """Whether inputs of validation and test are among the neighbors, as in SRA-CL's code. Needs
    embeddings that were made with held_out."""
    index: Literal["auto", "exact", "ivf", "hnsw"] = "auto"
    """How neighbors are found; `auto` is exact up to `exact_up_to` vectors and ivf above."""
    exact_up_to: PositiveInt = 200_000
    """Vectors; exact search takes time in their square."""
    num_lists: PositiveInt | None = None
    """Cells of an ivf index; None: twice the square root of the number of its vectors."""
    num_probes: PositiveInt | None = None
    """Cells of an ivf index that a search looks into; None: a 32nd of them, and 16 at least, but
    twice and twice again as many until `min_recall` is met."""
    num_links: Annotated[int, Ge(2)] = 32
    """Links of a vector in an hnsw index."""
    ef_construction: PositiveInt = 80
    """Candidates that are held while a vector is linked into an hnsw index."""
    ef_search: PositiveInt = 64
    """Candidates that are held while an hnsw index is searched."""
    vectors_per_index: PositiveInt = 20_000_000
    """Most vectors of an index: two bytes for each number of a vector, and more for hnsw's links.
    More vectors get several indexes, each of whole parts of the table and built by a task of its
    own, which holds it in memory and once more as a file. Every query asks all of them, one after
    another: the object store of a node must hold one index, or one part of the vectors, at a time.
    It searches at full speed if it holds all indexes and all vectors, four bytes a number together;
    what it does not hold is spilled, and read again by every task."""
    most_more: PositiveInt = 64
    """An index is asked for twice the neighbors and for as many more as there are windows of the
    same user. Users with more windows than this are searched for one by one instead, without
    their own."""
    recall_sample: PositiveInt = 1000
    """Queries whose neighbors are also found exactly, to measure the recall of an index."""
    min_recall: Annotated[NonNegativeFloat, Le(1)] = 0.9
    """Recall of an index below which the job stops before the search, if more probes of an ivf
    index do not mend it."""
    num_cpus: PositiveInt | None = None
    """CPUs in use at a time; None: as many as the cluster has."""
    cpus_per_task: PositiveInt = 1
    """CPUs, and compute threads, of each task; the building of an index is one."""
    queries_per_task: PositiveInt = 32_768
    """Windows whose neighbors a task finds. A task goes through all vectors once, so fewer cost
    time and more cost memory: four bytes for each number of their vectors, and with an index some
    60 for each candidate, of which there are twice num_neighbors and up to twice most_more."""
    block_mb: PositiveInt = 64
    """Similarities that a task holds at a time, in MB; it needs some three times this."""

    @property
    def table(self) -> str:
        """Name of the table that is made."""
        return self.name or self.embeddings

    def resolved(self, num_vectors: int) -> "RetrieveConfig":
        """With the method, and the cells of an ivf index, chosen for so many vectors."""
        method, lists, probes = self.index, self.num_lists, self.num_probes
        if method == "auto":
            method = "exact" if num_vectors <= self.exact_up_to else "ivf"
        if lists is None:
            lists = max(1, round(2 * math.sqrt(min(num_vectors, self.vectors_per_index))))
        if probes is None:
            probes = max(16, lists // 32)
        chosen = {"index": method, "num_lists": lists, "num_probes": probes}
        return self.model_copy(update=chosen)

    def wider(self) -> "RetrieveConfig | None":
        """With twice the probes, once it is resolved; None where all cells are probed already."""
        lists, probes = self.num_lists or 1, self.num_probes or 1
        if self.index != "ivf" or probes >= lists:
            return None
        return self.model_copy(update={"num_probes": min(2 * probes, lists)})

    @property
    def knobs(self) -> dict[str, str | int]:
        """What decides which neighbors are found, once it is resolved."""
        names = {
            "ivf": ("num_lists", "num_probes", "most_more", "vectors_per_index"),
            "hnsw": (
                "num_links",
                "ef_construction",
                "ef_search",
                "most_more",
                "vectors_per_index",
            ),
        }
        return self.model_dump(include={"index", *names.get(self.index, ())})
