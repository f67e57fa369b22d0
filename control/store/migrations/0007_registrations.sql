-- The bindings of each address-of-record that has any, as they must be taken up again; times as in calls.
CREATE TABLE registrations (
    aor        TEXT PRIMARY KEY,
    version    INTEGER NOT NULL,
    saved_at   TEXT NOT NULL,
    saved_now  REAL NOT NULL,
    boot_id    TEXT NOT NULL,
    bindings   BLOB NOT NULL
) STRICT;
