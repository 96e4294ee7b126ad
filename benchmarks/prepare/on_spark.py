"""PySpark on this machine's own threads: no cluster, one Java process."""

from pathlib import Path

from pyspark.sql import SparkSession, Window
from pyspark.sql import functions as F

from benchmarks.prepare.events import MIN_INTERACTIONS, NUM_CPUS, NUM_PARTITIONS, count_rows

DRIVER_MEMORY = "6g"
"""Java's heap: the bound that the whole job is held to, and no less than any other has."""


def session(temporary: str) -> SparkSession:
    """Spark with as many threads as the others have CPUs; its spills go to `temporary`."""
    return (
        SparkSession.builder.master(f"local[{NUM_CPUS}]")
        .config("spark.driver.memory", DRIVER_MEMORY)
        .config("spark.sql.shuffle.partitions", NUM_PARTITIONS)
        .config("spark.local.dir", temporary)
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )


def with_spark(spark: SparkSession, folder: Path, out: Path) -> int:
    """One shuffle for the counts of items and one for the users; the ids are joined in."""
    events = spark.read.parquet(str(folder))
    by_count = Window.orderBy(F.desc("count"), F.asc("item"))
    ids = (
        events.groupBy("item")
        .count()
        .where(F.col("count") >= MIN_INTERACTIONS)
        .select("item", F.row_number().over(by_count).cast("int").alias("item_id"))
    )
    # A sorted list of (time, item) a user is Spark's usual way to sequences; its length is the
    # user's count, which saves the second shuffle that a count of its own would take.
    lists = (
        events.join(ids, "item")
        .groupBy("user")
        .agg(F.sort_array(F.collect_list(F.struct("timestamp", "item_id"))).alias("events"))
        .where(F.size("events") >= MIN_INTERACTIONS)
    )
    lists.select(
        "user",
        F.col("events.item_id").alias("items"),
        F.col("events.timestamp").alias("timestamps"),
    ).write.parquet(str(out))
    return count_rows(out)
