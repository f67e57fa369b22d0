"""What tests stand on: phones, wires, generators, a running pair."""
