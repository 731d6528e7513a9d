"""MONAI Label's infer tasks."""
