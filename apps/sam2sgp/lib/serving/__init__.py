"""The network that stays loaded: its support set, its weights, the options of requests, their results."""
