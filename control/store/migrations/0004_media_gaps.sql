-- How often, and for how long, the relay was interrupted because the data plane was lost.
ALTER TABLE call_records ADD COLUMN media_interruptions INTEGER NOT NULL DEFAULT 0;
ALTER TABLE call_records ADD COLUMN media_gap_s REAL NOT NULL DEFAULT 0;
