"""How fast is a loss on a GPU, and where does the time go?"""
