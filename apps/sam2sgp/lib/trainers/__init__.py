"""MONAI Label's train tasks."""
