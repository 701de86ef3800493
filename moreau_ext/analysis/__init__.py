"""What can be said of a solution: residual on independent samples, curvature, certificate, derivative of the map."""
