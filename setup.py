from setuptools import find_packages, setup

setup(
    name="nspec", version="0.1.0",
    package_dir={"nspec": "nspec", "nspec.kernels": "kernels"},
    packages=find_packages(include=["nspec", "nspec.*"])
    + ["nspec.kernels"] + ["nspec.kernels." + name for name in find_packages("kernels")],
    package_data={"nspec": ["py.typed"]},
)
