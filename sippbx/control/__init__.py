"""The contract by which orchestrators drive the control plane."""
