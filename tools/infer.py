"""Find objects in images, or classify them: python -m dsnet_mm.inference."""

from dsnet_mm.inference.__main__ import main

if __name__ == '__main__':
    main()
