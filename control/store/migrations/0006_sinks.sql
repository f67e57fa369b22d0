-- How far each reader of call_records has come: the id of the last record that it has surely written, and a mark of its own
-- that tells where it stands. What an earlier version has written to the JSON lines is not written again.
CREATE TABLE sinks (
    name       TEXT PRIMARY KEY,
    record_id  INTEGER NOT NULL,
    mark       TEXT NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO sinks SELECT 'jsonl', id, '' FROM call_records ORDER BY id DESC LIMIT 1;
