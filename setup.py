"""What pyproject.toml cannot say: a wheel holds the native core, compiled for the platform it is built on."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# By its path: the package is not installed yet.
spec = spec_from_file_location("build_native", Path(__file__).parent / "src" / "meristem" / "native" / "build.py")
build_native = module_from_spec(spec)
spec.loader.exec_module(build_native)


class BuildWithCore(build_py):
    """The package, and in it the sources of the core and its libraries; an editable one compiles on first use."""

    def run(self):
        super().run()
        if not self.editable_mode:
            build_native.fill(Path(self.build_lib) / "meristem" / "native")


class PlatformDistribution(Distribution):
    """One of this platform, where there is a compiler to make its libraries."""

    def has_ext_modules(self):
        return build_native.has_compiler()


class PlatformWheel(bdist_wheel):
    """For any Python 3: the libraries do not call Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithCore, "bdist_wheel": PlatformWheel})
