//! Ranks as MPI has them: processes that `mpirun`, `srun` or an operator of Kubernetes starts.

use std::cell::{Cell, RefCell};

use ::mpi::Threading;
use ::mpi::environment::Universe;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator, CommunicatorCollectives, Destination, Root, Source};

use super::world::World;

/// All processes of the launch. An error inside MPI ends them all, which is MPI's default.
pub struct Mpi {
    /// Until it is closed.
    universe: RefCell<Option<Universe>>,
    world: SimpleCommunicator,
    sent: Cell<u64>,
}

/// MPI counts in `int`; longer messages are sent in parts of so many bytes.
const MESSAGE: usize = 1 << 30;

impl Mpi {
    /// Meets the other processes of the launch. This thread alone may speak with them.
    ///
    /// # Errors
    /// A sentence when that was done before, or MPI cannot be asked by a process of several threads.
    pub fn open() -> Result<Self, String> {
        let opened = ::mpi::initialize_with_threading(Threading::Funneled);
        let (universe, threading) = opened.ok_or("MPI was initialised before")?;
        if threading < Threading::Funneled {
            return Err("this MPI takes no process of several threads (MPI_THREAD_FUNNELED)".into());
        }
        let world = universe.world();
        Ok(Self { universe: RefCell::new(Some(universe)), world, sent: Cell::new(0) })
    }

    /// Whether other processes wait for this one.
    pub fn is_open(&self) -> bool {
        self.universe.borrow().is_some()
    }

    /// Ends all processes with a code, where they are not done with one another yet; this one ends as well.
    pub fn abort(&self, code: i32) {
        if self.is_open() {
            self.world.abort(code);
        }
    }

    fn count(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }

    fn others(&self) -> usize {
        self.size() - 1
    }
}

impl World for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn all_to_all(&self, own: &[u8], all: &mut [u8]) {
        self.count(own.len() / self.size() * self.others());
        self.world.all_to_all_into(own, all);
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) {
        self.count(own.len() * self.others());
        self.world.all_gather_into(own, all);
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let first = self.world.process_at_rank(0);
        let mut length = bytes.len() as u64;
        first.broadcast_into(&mut length);
        bytes.resize(length as usize, 0);
        bytes.chunks_mut(MESSAGE).for_each(|part| first.broadcast_into(part));
        if self.rank() == 0 {
            self.count((size_of::<u64>() + bytes.len()) * self.others());
        }
    }

    fn send(&self, bytes: &[u8]) {
        let first = self.world.process_at_rank(0);
        let length = bytes.len() as u64;
        first.send(&length);
        bytes.chunks(MESSAGE).for_each(|part| first.send(part));
        self.count(size_of::<u64>() + bytes.len());
    }

    fn receive(&self, from: usize) -> Vec<u8> {
        let from = self.world.process_at_rank(from as i32);
        let mut length = 0_u64;
        from.receive_into(&mut length);
        let mut bytes = vec![0; length as usize];
        for part in bytes.chunks_mut(MESSAGE) {
            from.receive_into(part);
        }
        bytes
    }

    fn sent_bytes(&self) -> u64 {
        self.sent.get()
    }

    fn close(&self) {
        drop(self.universe.borrow_mut().take());
    }
}

impl Drop for Mpi {
    /// A run that failed must not wait for the others, which wait for it.
    fn drop(&mut self) {
        self.abort(1);
    }
}
