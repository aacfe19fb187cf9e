"""Residual quantizers: fitted codebooks that turn a vector into codes, coarse to fine."""
