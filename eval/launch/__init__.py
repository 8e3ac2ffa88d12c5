"""Many runs as trials of Ray Tune."""
