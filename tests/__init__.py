"""Tests of renyi_kd."""
