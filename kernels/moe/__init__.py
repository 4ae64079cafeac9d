"""Mixture of experts: routing, products with the experts' weights, and the weighted sum."""
