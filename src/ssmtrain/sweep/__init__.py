"""Many runs from one line: each arm is a process of its own, on the same data order."""
