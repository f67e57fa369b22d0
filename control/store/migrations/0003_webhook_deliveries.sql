-- One row for each event that an endpoint is still to get, or did not get in time (dead_at). Delivered ones are deleted.
-- Times are RFC 3339 UTC with microseconds, so that text order is time order. The reference keeps retention from
-- deleting an event that somebody waits for.
CREATE TABLE webhook_deliveries (
    endpoint         TEXT NOT NULL,
    sequence         INTEGER NOT NULL REFERENCES events (sequence),
    queued_at        TEXT NOT NULL,
    attempts         INTEGER NOT NULL DEFAULT 0,
    next_attempt_at  TEXT NOT NULL,
    last_failure     TEXT,
    dead_at          TEXT,
    PRIMARY KEY (endpoint, sequence)
) STRICT, WITHOUT ROWID;

CREATE INDEX webhook_deliveries_due ON webhook_deliveries (endpoint, next_attempt_at, sequence) WHERE dead_at IS NULL;
CREATE INDEX webhook_deliveries_dead ON webhook_deliveries (endpoint, dead_at) WHERE dead_at IS NOT NULL;
-- For the reference: what an event that is deleted would leave behind.
CREATE INDEX webhook_deliveries_by_event ON webhook_deliveries (sequence);
