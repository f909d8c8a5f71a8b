//! The `understudy` binary.

use std::process::ExitCode;

use understudy::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::read();
    // candle asks for the number of processors at every matrix product, and ignores cgroups, unless
    // this variable tells it; rayon's global pool reads it too.
    // SAFETY: nothing has started a thread yet, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", cli.threads().to_string()) };
    cli.run()
}
