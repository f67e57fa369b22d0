"""Who hears what happens to calls: the fan-out and the observers that are not stores."""
