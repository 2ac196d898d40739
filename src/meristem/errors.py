"""Everything a user can cause, as one tree.

MeristemError
|- ConfigError (2)      UnknownKey  WrongValue  ConflictingKeys  DeadKey  SnapshotTooLarge
|- ShapeError (2)
|- CapabilityError (3)  a device, dtype or operation that is not there
|- MissingExtra (3)     an optional package that is not installed
|- PluginError (3)      PluginConflict  PluginTooOld
|- SinkError (3)
|- RunError (3)         RunInUse  DiskFull  NoSession  SessionBusy
|- AccessError (3)      KeyRefused  NotAllowed  HostRefused  RateExceeded  TooManySessions
|- WorkerError (3)      WorkerTimeout  WorkerDied  QueueFull  BreakerOpen
|- DataError (4)        CorpusTooShort  ManifestMismatch  BadRecords  SplitError  TokenizerMismatch  FileChanged
|                       SecretsFound
|- CheckpointError (4)  CheckpointCorrupt  CheckpointMismatch  CheckpointTooNew  NoCheckpoint
|- TrainingError (5)    NonFinite  OutOfDeviceBytes  DeviceLost  RollbackFailed  Halted  StateTransferFailed
|                       AgreementFailed
|- SafetyError (2)      PolicyError  Blocked (1)
`- GrowthError (5)      IllegalTransition  MissingDependency  ReportInvalid  MissingMetric
                        OrderRefused  PolicyTimeout  InferenceFailed  OverBudget  TransactionUndone
                        OwnershipRefused  ArtifactFailed  CertificateRefused  BlendRefused

The number is the exit code of the command line. A message says what was found, what was expected and what to do.
``exit_code`` gives the codes of all other errors.
"""

from typing import ClassVar, Final

UNEXPECTED: Final = 70
"""The exit code of an error that nobody foresaw: a fault of this program or of a plugin."""

CPU_IS_FULL: Final = "can't allocate memory"
"""What torch says in a plain RuntimeError where a CPU has no room; on accelerators it has a type for it."""


class MeristemError(Exception):
    """An error that the user can mend. ``fields`` holds what a program needs: paths, names, numbers."""

    exit_code: ClassVar[int] = UNEXPECTED

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.fields = fields


class ConfigError(MeristemError):
    """The configuration cannot be used."""

    exit_code = 2


class UnknownKey(ConfigError):
    """A key that no part of the configuration knows."""


class WrongValue(ConfigError):
    """A value of the wrong type, out of range, or a name that nothing is registered under."""


class ConflictingKeys(ConfigError):
    """Two keys that are fine alone and impossible together."""


class DeadKey(ConfigError):
    """A key that the other choices make meaningless."""


class SnapshotTooLarge(ConfigError):
    """Snapshots in memory that do not fit into the bytes they may take."""


class ShapeError(MeristemError):
    """A tensor at a door whose axes are not the expected ones."""

    exit_code = 2


class CapabilityError(MeristemError):
    """A device, dtype or operation that this machine does not offer."""

    exit_code = 3


class MissingExtra(MeristemError):
    """An optional package that is not installed."""

    exit_code = 3


class PluginError(MeristemError):
    """A plugin that cannot be loaded."""

    exit_code = 3


class PluginConflict(PluginError):
    """Two plugins under one name."""


class PluginTooOld(PluginError):
    """A plugin built for another major version of the interface."""


class SinkError(MeristemError):
    """A sink that cannot start."""

    exit_code = 3


class RunError(MeristemError):
    """A run directory that cannot be used."""

    exit_code = 3


class RunInUse(RunError):
    """Another process is writing into this run directory."""


class DiskFull(RunError):
    """No space is left where something had to be saved."""


class NoSession(RunError):
    """No session, or no turn of it that can be returned to, where one was expected."""


class SessionBusy(RunError):
    """A session that another request is writing to."""


class AccessError(MeristemError):
    """A request that a server does not take from whoever sends it."""

    exit_code = 3


class KeyRefused(AccessError):
    """No key, or one that is not valid."""


class NotAllowed(AccessError):
    """A valid key for something that it does not open, or a page of another site that sends a request."""


class HostRefused(AccessError):
    """A request for a host by whose name this server is not called."""


class RateExceeded(AccessError):
    """More requests than may be sent in a minute; its field ``retry_after_s`` says when there may be another."""


class TooManySessions(AccessError):
    """One session more than a key may have."""


class WorkerError(MeristemError):
    """A call in another process that gave no result."""

    exit_code = 3


class WorkerTimeout(WorkerError):
    """A call that was not done at its deadline; its process is gone."""


class WorkerDied(WorkerError):
    """A process that ended in the middle of a call."""


class QueueFull(WorkerError):
    """More calls at once than a bounded queue takes."""


class BreakerOpen(WorkerError):
    """A call that is not tried, since too many before it failed."""


class DataError(MeristemError):
    """A text, corpus or tokenizer that cannot be used."""

    exit_code = 4


class CorpusTooShort(DataError):
    """Fewer tokens than one sequence needs."""


class ManifestMismatch(DataError):
    """A corpus whose files are not those its manifest describes."""


class BadRecords(DataError):
    """Records that cannot be read."""


class SplitError(DataError):
    """A split that is empty or badly described."""


class TokenizerMismatch(DataError):
    """A tokenizer other than the one expected."""


class FileChanged(DataError):
    """A file that changed while it was in use."""


class SecretsFound(DataError):
    """A text with secrets in it, where none may be. No field holds them."""


class CheckpointError(MeristemError):
    """A checkpoint that cannot be used."""

    exit_code = 4


class CheckpointCorrupt(CheckpointError):
    """A checkpoint with missing, short or altered files."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint of another model, tokenizer or optimizer."""


class CheckpointTooNew(CheckpointError):
    """A checkpoint of a schema that this version does not know."""


class NoCheckpoint(CheckpointError):
    """No checkpoint where one was expected."""


class TrainingError(MeristemError):
    """Training cannot go on."""

    exit_code = 5


class NonFinite(TrainingError):
    """A loss or gradient was infinite or not a number too often, or a prediction was."""


class OutOfDeviceBytes(TrainingError):
    """The device has no room for the next step."""


class DeviceLost(TrainingError):
    """The device stopped answering."""


class RollbackFailed(TrainingError):
    """No earlier state of the run could be brought back."""


class Halted(TrainingError):
    """The run stopped itself, since rollbacks did not help."""


class StateTransferFailed(TrainingError):
    """What an optimizer has gathered cannot be given to the one that was to follow it."""


class AgreementFailed(TrainingError):
    """The processes of a run do not stand at the same place."""


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ``error`` ends: what the system refuses is a matter of the environment."""
    if isinstance(error, MeristemError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    is_refused = isinstance(error, (OSError, MemoryError)) or CPU_IS_FULL in str(error)
    return RunError.exit_code if is_refused else UNEXPECTED


class SafetyError(MeristemError):
    """A text that a policy stops, or a policy that cannot be used."""

    exit_code = 2


class PolicyError(SafetyError):
    """A policy with a rule that does not do what its examples say, or that cannot be bounded."""


class Blocked(SafetyError):
    """A text that a rule forbids. The fields name the rule and where it stands; nothing holds the text."""

    exit_code = 1


class GrowthError(MeristemError):
    """A model cannot be grown as was asked; it is as it was."""

    exit_code = 5


class IllegalTransition(GrowthError):
    """A seed cannot go from the stage that it is at to the one that was requested."""


class MissingDependency(GrowthError):
    """An order that does not name all that it needs."""


class ReportInvalid(GrowthError):
    """A report of growth that lacks what every report has."""


class MissingMetric(GrowthError):
    """A number that is required and was not measured."""


class OrderRefused(GrowthError):
    """A proposal that names what is not there or is not allowed; its field ``code`` says which."""


class PolicyTimeout(GrowthError):
    """A policy that had not answered at its deadline."""


class InferenceFailed(GrowthError):
    """A policy that raised, ended, or gave something other than a proposal."""


class BlendRefused(GrowthError):
    """A blend that lacks what it is computed from; its field ``blend`` says which."""


class OverBudget(GrowthError):
    """A change of structure that would cost more than it may."""


class TransactionUndone(GrowthError):
    """A change of structure that failed; model, optimizer and generators are what they were."""


class OwnershipRefused(GrowthError):
    """A parameter is not for the one that would train it; the fields ``code``, ``names`` and ``holder`` say why."""


class ArtifactFailed(GrowthError):
    """A blueprint or trained seed that could not be had from a library; the field ``reason`` says why."""


class CertificateRefused(GrowthError):
    """A seed that is trusted less than was allowed, or whose certificate speaks against it."""
