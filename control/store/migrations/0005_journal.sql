-- Whose this file is: each process that opens it takes the next epoch, and commits nothing once another has.
CREATE TABLE owner (
    only   INTEGER PRIMARY KEY CHECK (only = 1),
    epoch  INTEGER NOT NULL
) STRICT;

INSERT INTO owner VALUES (1, 0);

-- The calls that run, as they must be taken up again. `record` is what would be kept of the call if that were impossible:
-- the values of a row of call_records, in JSON. `saved_now` is monotonic seconds since the boot `boot_id`.
CREATE TABLE calls (
    call_id    TEXT PRIMARY KEY,
    version    INTEGER NOT NULL,
    saved_at   TEXT NOT NULL,
    saved_now  REAL NOT NULL,
    boot_id    TEXT NOT NULL,
    record     TEXT NOT NULL,
    snapshot   BLOB NOT NULL
) STRICT;

-- What could not be read: kept for people to look at.
CREATE TABLE calls_set_aside (
    call_id    TEXT NOT NULL,
    version    INTEGER NOT NULL,
    saved_at   TEXT NOT NULL,
    set_aside_at TEXT NOT NULL,
    reason     TEXT NOT NULL,
    snapshot   BLOB NOT NULL
) STRICT;
