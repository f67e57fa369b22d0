"""How other programs drive this node: gRPC and HTTP, two faces of one service."""
