"""How fast is a loss on a CPU, and how much memory does it need?"""
