"""The control plane: speaks SIP, decides, and programs the data plane."""
