"""Layout-free state on disk: written under one layout, read under any other."""
