"""The contract by which the control plane programs the data plane."""
