-- What happened on this node, in order; data is the event's own JSON. Times as in call_records.
CREATE TABLE events (
    sequence  INTEGER PRIMARY KEY,
    id        TEXT NOT NULL UNIQUE,
    type      TEXT NOT NULL,
    at        TEXT NOT NULL,
    call_id   TEXT,
    data      BLOB NOT NULL
) STRICT;

-- The highest sequence that retention has deleted: who continues behind an earlier one has missed something.
CREATE TABLE events_deleted (
    only     INTEGER PRIMARY KEY CHECK (only = 1),
    through  INTEGER NOT NULL
) STRICT;

INSERT INTO events_deleted VALUES (1, 0);
