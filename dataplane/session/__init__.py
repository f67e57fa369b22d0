"""Media sessions: the state that is wanted of them (`spec`) and the rules by which they relay (`relay`). Pure."""
