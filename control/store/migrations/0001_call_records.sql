-- One row for each call and each refused INVITE. Times are RFC 3339 UTC with microseconds, so that text order is time order.
CREATE TABLE call_records (
    id              INTEGER PRIMARY KEY,
    call_id         TEXT NOT NULL UNIQUE,
    direction       TEXT NOT NULL,
    caller          TEXT NOT NULL,
    callee          TEXT NOT NULL,
    invited_at      TEXT NOT NULL,
    ringing_at      TEXT,
    answered_at     TEXT,
    ended_at        TEXT NOT NULL,
    setup_s         REAL NOT NULL,
    duration_s      REAL NOT NULL,
    result          TEXT NOT NULL,
    reason          TEXT NOT NULL,
    sip_status      INTEGER NOT NULL,
    ended_by        TEXT,
    detail          TEXT NOT NULL,
    media_complete  INTEGER NOT NULL,
    legs            TEXT NOT NULL CHECK (json_valid(legs)),
    streams         TEXT NOT NULL CHECK (json_valid(streams))
) STRICT;

CREATE INDEX call_records_by_end ON call_records (ended_at);
