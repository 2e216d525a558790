"""What is told of a count of stored activations."""

from austeer.measuring.stored.count import CountReport
from austeer.measuring.stored.needs import CountNeeds


def test_needs_for_people():
    needs = CountNeeds(
        shards=7,
        rows=3_000_000,
        columns=100_000,
        bytes=1_200_000_000_000,
        counters=4_000_000,
        chunks=100_000_000,
        device_chunks=0,
        result=3_200_000,
        read_rate=2e9,
        count_rate=1.5e9,
        seconds=800.0,
    )
    assert needs.lines() == [
        "3000000 rows x 100000 AUs in 7 shards: 1200.00 GB, read once",
        "memory: 0.004 GB of counters, 0.100 GB of chunks; momentum file 0.003 GB",
        "storage gives 2.00 GB/s, counting takes 1.50 GB/s: about 800 s",
    ]
    assert needs.to_json()["seconds"] == 800.0


def test_report_for_people():
    report = CountReport(
        rows=4000, bytes=1_600_000_000, seconds_read=0.5, seconds_wait=0.1, seconds_count=0.8, seconds=1.0
    )
    assert report.line() == (
        "4000 rows, 1.60 GB in 1.0 s, 1.60 GB/s; waiting for storage 0.1 s, counting 0.8 s, checkpoints 0.0 s "
        "(reading, beside it, 0.5 s)"
    )
    assert CountReport().bytes_per_second == 0.0
