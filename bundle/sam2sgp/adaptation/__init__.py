"""Adaptation of the network to a support set before inference."""
